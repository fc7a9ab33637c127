"""The looped forward, written by hand over a plain transformers model; shares no code with the template.

Nothing is cached. For every chunk of tokens the whole sequence so far is run again, layer by layer, and the keys and
values that an iteration may see are forced by overwriting the outputs of the K and V projections, row by row.

Source: method.md sections 1 to 3, restated for rows of a sequence:

    past rows     shared, reference: natural K/V;    per_step: those that pass k had when the row was computed
    chunk's rows  shared: natural K/V;               per_step, reference: the iterate's own
    a row that did not loop has, in every pass, its natural K/V
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager

import torch


class Oracle:
    """Runs tokens through a plain model with a loop, chunk by chunk.

    Args:
        model: a plain decoder in eval mode; its layers are `model.model.layers`.
        span, steps, damping, anchor, mode, kv, decode, first_n: the loop.
    """

    def __init__(
        self, model, span, steps, damping=None, anchor=0.0, mode="block", kv="shared", decode="full", first_n=0
    ):
        self.model = model
        self.layers = list(model.model.layers)
        self.steps = steps
        self.step_size = 1 / steps if damping is None else damping
        self.anchor = anchor
        self.kv = kv
        self.decode = decode
        self.first_n = first_n
        self.stop = span[1]
        numbers = list(range(*span))
        self.bodies = [numbers] if mode == "block" else [[number] for number in numbers]

    def logits(self, tokens, chunks, attention_mask=None):
        """Logits of all rows, `(batch, sum(chunks), vocab)`, each as computed with its chunk."""
        outputs = [None] * len(self.bodies)  # of each loop body, rows so far
        pass_kv = defaultdict(lambda: None)  # (pass, layer) -> rows so far
        rows, logits, decode_steps = 0, [], 0
        for length in chunks:
            is_decode_step = length == 1 and rows > 0
            decode_steps = decode_steps + 1 if is_decode_step else 0
            loops = (
                not is_decode_step
                or {
                    "full": True,
                    "bypass": False,
                    "first_n": decode_steps <= self.first_n,
                }[self.decode]
            )
            end = rows + length
            mask = None if attention_mask is None else attention_mask[:, :end]
            h, calls = self._inputs(tokens[:, :end], mask, self.bodies[0][0])
            for number, body in enumerate(self.bodies):
                new = self._body(body, h, calls, rows, loops, pass_kv)
                outputs[number] = new if outputs[number] is None else torch.cat([outputs[number], new], dim=1)
                h = outputs[number]
            logits.append(self._finish(tokens[:, :end], mask, h)[:, rows:])
            rows = end
        return torch.cat(logits, dim=1)

    def _body(self, body, x, calls, rows, loops, pass_kv):
        """Output rows of the latest chunk, for one loop body and inputs of all rows."""
        natural_kv = {}
        n = self._run(body, x, calls, record=natural_kv)
        for k in range(1, self.steps):
            for layer in body:
                key = (k, layer)
                if pass_kv[key] is None:
                    pass_kv[key] = [each[:, :0] for each in natural_kv[layer]]
        if not loops:
            for k in range(1, self.steps):
                for layer in body:
                    self._append(pass_kv, (k, layer), [each[:, rows:] for each in natural_kv[layer]])
            return n[:, rows:]
        h = x + self.step_size * (n - x) if self.step_size != 1 else n
        for k in range(1, self.steps):
            own_kv = {}

            def force(layer, own, k=k):
                natural = natural_kv[layer]
                past = pass_kv[k, layer] if self.kv == "per_step" else [each[:, :rows] for each in natural]
                chunk = [each[:, rows:] for each in (natural if self.kv == "shared" else own)]
                return [torch.cat([p, c], dim=1) for p, c in zip(past, chunk, strict=True)]

            g = self._run(body, h, calls, record=own_kv, force=force)
            for layer in body:
                self._append(pass_kv, (k, layer), [each[:, rows:] for each in own_kv[layer]])
            h = h + self.step_size * (g - h) if self.step_size != 1 else g
        return (self.anchor * n + (1 - self.anchor) * h)[:, rows:]

    @staticmethod
    def _append(pass_kv, key, new):
        pass_kv[key] = [torch.cat([old, rows], dim=1) for old, rows in zip(pass_kv[key], new, strict=True)]

    def _inputs(self, tokens, mask, first):
        """What layer `first` is called with, and how the model calls each layer, in a plain forward."""
        calls = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, number=number: calls.__setitem__(number, (args, dict(kwargs))),
                with_kwargs=True,
            )
            for number, layer in enumerate(self.layers)
        ]
        try:
            self.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return calls[first][0][0], calls

    def _run(self, body, h, calls, record, force=None):
        for number in body:
            with _projections(self.layers[number], number, record, force):
                output = self.layers[number](h, *calls[number][0][1:], **calls[number][1])
            h = output[0] if isinstance(output, tuple) else output
        return h

    def _finish(self, tokens, mask, h):
        """Logits from the hidden states after the span: a plain forward with them put in place."""
        module = self.layers[self.stop] if self.stop < len(self.layers) else self.model.model.norm
        hook = module.register_forward_pre_hook(lambda module, args, kwargs: ((h, *args[1:]), kwargs), with_kwargs=True)
        try:
            return self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        finally:
            hook.remove()


@contextmanager
def _projections(layer, number, record, force):
    """Record the outputs of a layer's K and V projections, and replace them by what `force` says."""
    attention = layer.self_attn
    if hasattr(attention, "qkv_proj"):  # phi3: one projection for all three
        groups, heads = attention.config.num_key_value_heads, attention.config.num_attention_heads
        width = attention.qkv_proj.out_features // (heads + 2 * groups)
        sizes = [heads * width, groups * width, groups * width]

        def fused(module, args, output):
            query, *own = output.split(sizes, dim=-1)
            record[number] = own
            return None if force is None else torch.cat([query, *force(number, own)], dim=-1)

        hooks = [attention.qkv_proj.register_forward_hook(fused)]
    else:
        own = {}

        def key(module, args, output):
            own["key"] = output
            return None if force is None else force(number, [output, output])[0]

        def value(module, args, output):
            record[number] = [own["key"], output]
            return None if force is None else force(number, [output, output])[1]

        hooks = [attention.k_proj.register_forward_hook(key), attention.v_proj.register_forward_hook(value)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
