"""The function that an update rule evaluates: one run of the layers of a span, or of one layer, on given hidden states.

Every export has a copy of this file. It needs only torch.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from .looped_path import BodySpec


class Body:
    """g for one span (in layer mode, one layer) in one forward: each call runs the recorded layers once more.

    The first call runs nothing: it returns the result of the natural pass, which the native model has already run.

    Attributes:
        steps, step_size: K and s.
        calls: the `LayerCall` of each layer, in order.
        natural_outputs: each layer's output in the natural pass, `(batch, seq, hidden)`.

    It raises ValueError if the model changed the hidden states between two layers: iterations would miss that.
    """

    def __init__(self, spec: BodySpec, calls: list, passed: list, natural):
        """
        Args:
            spec: what loops.
            calls: see above.
            passed: the calls of all layers from the first one of the body to the one after which it runs again.
            natural: the hidden states after the natural pass, `(batch, seq, hidden)`.
        """
        for before, after in pairwise(passed):
            if not _is_same(after.hidden, before.output):
                raise ValueError(
                    f"the model changes the hidden states between layers {before.index} and {after.index}, inside a "
                    "span (it adds features of an image, or drops tokens); choose a span on one side of the change, "
                    "or mode layer"
                )
        self.steps = spec.steps
        self.step_size = spec.step_size
        self.calls = calls
        self.natural_outputs = [call.hidden for call in calls[1:]] + [natural]
        self.has_begun = False

    @property
    def natural(self):
        """n, the output of the natural pass, `(batch, seq, hidden)`."""
        return self.natural_outputs[-1]

    def __call__(self, hidden, replace=None):
        """g(hidden), `(batch, seq, hidden)`; `replace(position, output)`, if given, replaces each layer's output."""
        if not self.has_begun:
            self.has_begun = True
            return self.natural
        for position, call in enumerate(self.calls):
            call.iterations += 1  # of the layer: a path may run it in several bodies
            hidden = call.run_iteration(call.iterations, hidden)
            hidden = hidden if replace is None else replace(position, hidden)
        return hidden

    def placed(self, hidden):
        """Hidden states on the device of the body's output: a device_map may split a span over devices."""
        return hidden.to(self.natural.device)

    @staticmethod
    def norm(hidden):
        """L2 norm of each token's hidden state in fp32, `(batch, seq, 1)`."""
        return hidden.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)

    @staticmethod
    def rescale(hidden, norm):
        """Scale each token to a norm, in fp32."""
        return (hidden.float() * (norm / Body.norm(hidden))).to(hidden.dtype)


def _is_same(hidden, output) -> bool:
    """Whether hidden states are a layer's output, untouched; a compiled graph knows no more than that shapes agree."""
    if hidden is output or hidden.shape != output.shape:
        return hidden is output
    return torch.compiler.is_compiling() or hidden.data_ptr() == output.data_ptr()  # a slice of all tokens is the same
