"""Does the loop run, and does it change anything?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

from loopexport.export.check import Check
from loopexport.loop.spec import LoopSpec

from .probe import Probe, full_logits

if TYPE_CHECKING:
    import torch

LAYER_RUNS = "each layer runs as often as the loop says"
CHANGES_LOGITS = "the loop changes the logits"
IMAGE_COUNTS = "an image in the prompt changes the logits"


def decoder_layers(model) -> list:
    """The decoder layers of a model, native or looped: the ModuleList with as many items as it has layers.

    Of several it is the one nearest to the token embeddings, since a vision tower may have as many layers, and then the
    outermost. The list itself is not iterated, since a looped model may make that a forward.
    """
    from torch import nn

    count = model.config.get_text_config(decoder=True).num_hidden_layers
    embeddings = model.get_input_embeddings()
    near = next(name for name, module in model.named_modules() if module is embeddings).split(".")
    lists = {
        name: list(module.children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    return lists[min(lists, key=lambda name: (-_shared_start(name.split("."), near), name.count(".")))]


def _shared_start(path: list[str], other: list[str]) -> int:
    """How many of their first parts two paths share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False)))


@contextmanager
def counted_runs(model) -> Iterator[list[int]]:
    """Count how often each decoder layer runs, until the block ends."""
    layers = decoder_layers(model)
    runs = [0] * len(layers)

    def count(number: int):
        def hook(*_):
            runs[number] += 1

        return hook

    handles = [layer.register_forward_hook(count(number)) for number, layer in enumerate(layers)]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def check_runs(runs: list[int], spec: LoopSpec) -> Check:
    """Compare how often each layer ran in one full forward with its loop.

    Args:
        runs: from `counted_runs`.
        spec: the loop.
    """
    for number, (count, wanted) in enumerate(zip(runs, spec.layer_runs(len(runs)), strict=True)):
        if count != wanted:
            return Check(LAYER_RUNS, False, f"layer {number} runs {count} times, not {wanted}")
    return Check(LAYER_RUNS, True, _runs_in_words(Counter(runs[number] for number in spec.layers), runs.count(0)))


def _runs_in_words(looped: Counter[int], num_skipped: int) -> str:
    """How often layers run: `4 looped layers 3 times, others once`."""
    words = [f"{count} looped layers {times} times" for times, count in sorted(looped.items())]
    return ", ".join([*words, *([f"{num_skipped} never"] if num_skipped else []), "others once"])


def check_effect(looped: torch.Tensor, base: torch.Tensor, by_hand: torch.Tensor | None, spec: LoopSpec) -> Check:
    """Check that the logits differ from the base's, unless the loop is an identity.

    Args:
        looped: logits of the looped model.
        base: logits of the base.
        by_hand: logits of the loop by hand, if it could be computed. If they are the base's too, the loop is too weak
            to show.
        spec: the loop.
    """
    difference = (looped - base).abs().max().item()
    if spec.is_identity:
        why = f"steps {spec.steps}, anchor {spec.anchor:g} is the base model"
        return Check(CHANGES_LOGITS, None, f"does not apply: {why}; largest difference {difference:.3g}", difference)
    detail = f"largest difference from the base {difference:.3g}"
    if difference != 0:
        return Check(CHANGES_LOGITS, True, detail, difference)
    if by_hand is not None and by_hand.equal(base):
        return Check(CHANGES_LOGITS, None, f"{detail}; the loop by hand changes nothing either", difference)
    return Check(CHANGES_LOGITS, False, detail, difference)


def image_effect(model, probe: Probe, logits: torch.Tensor) -> float:
    """How much another image changes the logits of the last token."""
    if not probe.prompt:
        return 0.0
    other = full_logits(model, probe.with_other_image())
    return (other[:, -1] - logits[:, -1]).abs().max().item()


def check_image(model, probe: Probe, looped: torch.Tensor, base_effect: float) -> list[Check]:
    """Check that the image of the prompt reaches the last token, as in the base; no check for a base of text alone."""
    if probe.reason:
        return [Check(IMAGE_COUNTS, None, f"not checked: the prompt has text alone: {probe.reason}")]
    if not probe.prompt:
        return []
    effect = image_effect(model, probe, looped)
    detail = f"the negative of the image changes them by {effect:.3g}, those of the base by {base_effect:.3g}"
    return [Check(IMAGE_COUNTS, effect > 0 if base_effect else None, detail, effect)]
