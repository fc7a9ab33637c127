"""An independent implementation of the looped forward over a plain transformers model; no code of the template.

It has no cache. For every chunk of tokens it runs the whole sequence so far again, layer by layer. It overwrites rows
of the outputs of the K and V projections with the keys and values that an iteration may see, and, for frozen routing,
the outputs of the routers.

Source: method.md sections 1 to 3, restated for rows (tokens) of a sequence. Keys and values that pass k sees:

    past rows         shared, reference: natural;    per_step: from pass k, when the row was computed
    rows of the chunk shared: natural;               per_step, reference: from the iterate
    a row that skipped the loop: natural in every pass
"""

from __future__ import annotations

import functools
from collections import defaultdict

import torch

from support.projections import projection_hooks

CHOSEN = "prev_topk_indices"  # argument of layers that may read the positions that the layer before returned


class Oracle:
    """Runs tokens through a plain model with a loop, chunk by chunk.

    Args:
        model: a plain decoder in eval mode.
        span, steps, anchor, mode, kv, decode, first_n, frozen_routing: the loop; several spans as a list, and so their
            steps if they differ.
        rule: name of the update rule in `UPDATES`.
        inputs: returns what a forward of these tokens takes beside them, such as a picture; None for nothing.
        **values: fields of the rule, such as `damping`.
    """

    def __init__(
        self,
        model,
        span,
        steps,
        anchor=0.0,
        mode="block",
        kv="shared",
        decode="full",
        first_n=0,
        rule="euler",
        frozen_routing=False,
        inputs=None,
        **values,
    ):
        self.model = model
        self.inputs = inputs or (lambda tokens: {})
        inner = model.base_model if model.base_model is not model else model.model  # Gemma 3 on transformers 4
        inner = getattr(inner, "language_model", inner)
        self.layers = list(inner.h if hasattr(inner, "h") else inner.layers)
        self.final_norm = next(
            getattr(inner, name)
            for name in ("norm", "ln_f", "final_layer_norm", "hyper_connection_mixer")
            if hasattr(inner, name)
        )
        evaluations = {"midpoint": 2, "heun": 2, "rk4": 4}.get(rule, 1)
        self.anchor = anchor
        self.kv = kv
        self.decode = decode
        self.first_n = first_n
        self.frozen_routing = frozen_routing
        spans = span if isinstance(span, list) else [span]
        self.bodies, self.loops = [], []  # the layers that loop together; for each, its passes and its update
        for each, count in zip(spans, steps if isinstance(steps, list) else [steps] * len(spans), strict=True):
            bodies = [list(range(*each))] if mode == "block" else [[number] for number in range(*each)]
            self.bodies += bodies
            update = functools.partial(UPDATES[rule], steps=count, **values)
            self.loops += [(count * (evaluations if count > 1 else 1), update)] * len(bodies)

    def logits(self, tokens, chunks, attention_mask=None):
        """Logits of all rows, `(batch, sum(chunks), vocab)`, each row computed with its chunk."""
        outputs = [None] * len(self.bodies)  # by loop body: its output rows so far
        choices = [None] * len(self.bodies)  # by loop body: the positions that its last layer returned, for each row
        pass_kv = defaultdict(lambda: None)  # (pass, layer) -> K/V rows so far
        rows, logits, decode_steps = 0, [], 0
        for length in chunks:
            is_decode_step = length == 1 and rows > 0
            decode_steps = decode_steps + 1 if is_decode_step else 0
            decode_loops = {"full": True, "bypass": False, "first_n": decode_steps <= self.first_n}
            loops = not is_decode_step or decode_loops[self.decode]
            end = rows + length
            mask = None if attention_mask is None else attention_mask[:, :end]
            h, calls = self._inputs(tokens[:, :end], mask, self.bodies[0][0])
            reached = self.bodies[0][0]
            self.chosen = calls[reached][1].get(CHOSEN)
            for number, body in enumerate(self.bodies):
                h = self._run(range(reached, body[0]), h, calls)
                self.passes, self.update = self.loops[number]
                new = self._body(body, h, calls, rows, loops, pass_kv)
                outputs[number] = new if outputs[number] is None else torch.cat([outputs[number], new], dim=1)
                h, reached = outputs[number], body[-1] + 1
                if self.chosen is not None:
                    parts = (
                        [self.chosen[:, rows:]] if choices[number] is None else [choices[number], self.chosen[:, rows:]]
                    )
                    choices[number] = self.chosen = torch.cat(parts, dim=1)
            logits.append(self._finish(tokens[:, :end], mask, h)[:, rows:])
            rows = end
        return torch.cat(logits, dim=1)

    def _body(self, body, x, calls, rows, loops, pass_kv):
        """Output rows of the latest chunk, `(batch, chunk, hidden)`, of one loop body; `x` has all rows."""
        natural_kv, routes = {}, {}
        outputs = []  # by layer of the body: natural output rows of the latest chunk
        n = self._run(body, x, calls, natural_kv, routes=routes, each=lambda h: outputs.append(h[:, rows:]) or h)
        for k in range(1, self.passes):
            for layer in natural_kv:
                key = (k, layer)
                if pass_kv[key] is None:
                    pass_kv[key] = [each[:, :0] for each in natural_kv[layer]]
        if not loops:
            for k in range(1, self.passes):
                for layer in natural_kv:
                    self._append(pass_kv, (k, layer), [each[:, rows:] for each in natural_kv[layer]])
            return n[:, rows:]
        k = 0

        def g(h, each=lambda h: h):
            """Pass k, from rows to rows of the latest chunk; past rows are overwritten where the chunk reads them."""
            nonlocal k
            k += 1
            if k == 1:
                return n[:, rows:]
            own_kv = {}

            def force(layer, own, k=k - 1):
                natural = natural_kv[layer]
                past = pass_kv[k, layer] if self.kv == "per_step" else [each[:, :rows] for each in natural]
                chunk = [each[:, rows:] for each in (natural if self.kv == "shared" else own)]
                return [torch.cat([p, c], dim=1) for p, c in zip(past, chunk, strict=True)]

            def each_chunk(h):
                return torch.cat([h[:, :rows], each(h[:, rows:])], dim=1)

            frozen = routes if self.frozen_routing else None
            full = torch.cat([x[:, :rows], h], dim=1)
            output = self._run(body, full, calls, own_kv, force, replay=frozen, each=each_chunk)
            for layer in own_kv:
                self._append(pass_kv, (k - 1, layer), [each[:, rows:] for each in own_kv[layer]])
            return output[:, rows:]

        h = self.update(x[:, rows:], n[:, rows:], g, natural_outputs=outputs)
        return self.anchor * n[:, rows:] + (1 - self.anchor) * h

    @staticmethod
    def _append(pass_kv, key, new):
        pass_kv[key] = [torch.cat([old, rows], dim=1) for old, rows in zip(pass_kv[key], new, strict=True)]

    def _forward(self, tokens, mask):
        """A plain forward without a cache."""
        return self.model(**{"input_ids": tokens, "attention_mask": mask, "use_cache": False, **self.inputs(tokens)})

    def _inputs(self, tokens, mask, first):
        """The input of layer `first` and the arguments of all layers, in a plain forward."""
        calls = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, number=number: calls.__setitem__(number, (args, dict(kwargs))),
                with_kwargs=True,
            )
            for number, layer in enumerate(self.layers)
        ]
        try:
            self._forward(tokens, mask)
        finally:
            for hook in hooks:
                hook.remove()
        return calls[first][0][0], calls

    def _run(self, body, h, calls, record=None, force=None, routes=None, replay=None, each=lambda h: h):
        for number in body:
            layer = self.layers[number]
            hooks = [] if record is None else projection_hooks(layer, number, record, force)
            hooks += _router_hooks(layer, number, routes, replay)
            try:
                output = layer(h, *calls[number][0][1:], **self._with_choice(calls[number][1]))
            finally:
                for hook in hooks:
                    hook.remove()
            if CHOSEN in calls[number][1]:
                self.chosen = output[1]
            h = each(output[0] if isinstance(output, tuple) else output)
        return h

    def _with_choice(self, kwargs):
        return {**kwargs, CHOSEN: self.chosen} if CHOSEN in kwargs else kwargs

    def _finish(self, tokens, mask, h):
        """Logits from the hidden states after the last span, by a plain forward that gets them instead of its own."""
        stop = self.bodies[-1][-1] + 1
        module = self.layers[stop] if stop < len(self.layers) else self.final_norm
        hook = module.register_forward_pre_hook(
            lambda module, args, kwargs: ((h, *args[1:]), self._with_choice(kwargs)), with_kwargs=True
        )
        try:
            return self._forward(tokens, mask).logits
        finally:
            hook.remove()


def _router_hooks(layer, number, routes, replay):
    """Record the output of a sparse layer's router in `routes`, or overwrite it by that in `replay`."""
    block = next((getattr(layer, name) for name in ("mlp", "block_sparse_moe") if hasattr(layer, name)), None)
    if not hasattr(block, "experts") or (routes is None and replay is None):
        return []
    router = block.gate if hasattr(block, "gate") else block.router

    def answer(module, args, output):
        if replay is not None:
            return replay[number]
        routes[number] = output
        return None

    return [router.register_forward_hook(answer)]


# ---------------------------------------------------------------------------------------------------------------------
# The update rules: h_K from x, n = g(x) and g, whose first call returns n. Source: method.md and the authors' code.
# ---------------------------------------------------------------------------------------------------------------------


def euler(x, n, g, steps, damping=None, norm_interpolation=False, **_):
    s = 1 / steps if damping is None else damping
    h = x
    for k in range(1, steps + 1):
        h = g(h) if (s == 1) else h + s * (g(h) - h)
        if norm_interpolation and k < steps:
            target = x.norm(dim=-1) + (n.norm(dim=-1) - x.norm(dim=-1)) * k / steps
            h = h * (target / h.norm(dim=-1))[..., None]
    return h


def residual_scaled(x, n, g, steps, **_):
    y = functools.reduce(lambda h, _: g(h), range(steps), x)
    return x + (y - x) / steps


def ema(x, n, g, steps, damping=0.5, schedule=None, **_):
    h = x
    for alpha in schedule or [damping] * steps:
        h = torch.lerp(h, g(h), alpha)
    return h


def runge_kutta(tableau, weights):
    def update(x, n, g, steps, damping=None, **_):
        s = 1 / steps if damping is None else damping
        h = x
        for _step in range(steps):
            slopes = []
            for factor in tableau:
                at = h + s * factor * slopes[-1] if slopes else h
                slopes.append(g(at) - at)
            h = h + s * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        return h

    return update


def heavy_ball(x, n, g, steps, damping=0.5, momentum=0.3, **_):
    path = [x, x]
    for _step in range(steps):
        path.append(path[-1] + damping * (g(path[-1]) - path[-1]) + momentum * (path[-1] - path[-2]))
    return path[-1]


def anderson(x, n, g, steps, damping=1.0, history=2, **_):
    points, images, h = [], [], x
    for _step in range(steps):
        points.append(h)
        images.append(g(h))
        residuals = [image - point for point, image in zip(points, images, strict=True)]
        m = min(history, len(points) - 1)
        h = (1 - damping) * points[-1] + damping * images[-1]
        if m:
            moves = torch.stack([points[-i] - points[-i - 1] for i in range(m, 0, -1)])
            changes = torch.stack([residuals[-i] - residuals[-i - 1] for i in range(m, 0, -1)])
            matrix = changes.flatten(1).T
            gram = matrix.T @ matrix
            gram = gram + 1e-6 * max(gram.diagonal().max().item(), 1e-8) * torch.eye(m)
            mix = torch.linalg.solve(gram, matrix.T @ residuals[-1].flatten())
            h = h - torch.einsum("m,m...->...", mix, (1 - damping) * moves + damping * changes)
    return h


def aitken(x, n, g, steps, **_):
    h = x
    for _step in range(steps // 2):
        once = g(h)
        twice = g(once)
        first, second = once - h, twice - 2 * once + h
        jump = -first.square() / second
        jump = jump.where(second.abs() > 1e-3 * first.abs() + 1e-4, first)
        h = h + jump.sign() * torch.minimum(jump.abs(), first.abs())
    return h


def norm_stab(x, n, g, steps, damping=0.5, **_):
    h = x
    for _step in range(steps):
        h = torch.nn.functional.normalize(torch.lerp(h, g(h), damping), dim=-1) * x.norm(dim=-1, keepdim=True)
    return h


def poly_blend(x, n, g, steps, schedule, **_):
    powers = [x]
    for _step in range(steps):
        powers.append(g(powers[-1]))
    return sum(weight * power for weight, power in zip(schedule, powers, strict=True))


def input_anchor(x, n, g, steps, damping=0.5, **_):
    return functools.reduce(lambda h, _: torch.lerp(x, g(h), damping), range(steps), x)


def uniform(x, n, g, steps, natural_outputs, **_):
    seen = [[output] for output in natural_outputs]
    h = g(x)
    for _step in range(steps - 1):
        layers = iter(seen)

        def mean(output, layers=layers):
            outputs = next(layers)
            outputs.append(output)
            return torch.stack(outputs).mean(dim=0)

        h = g(h, each=mean)
    return h


UPDATES = {
    "euler": euler,
    "residual_scaled": residual_scaled,
    "ema": ema,
    "ema_sched": ema,
    "midpoint": runge_kutta([0, 1 / 2], [0, 1]),
    "heun": runge_kutta([0, 1], [1 / 2, 1 / 2]),
    "rk4": runge_kutta([0, 1 / 2, 1 / 2, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    "heavy_ball": heavy_ball,
    "anderson": anderson,
    "aitken": aitken,
    "norm_stab": norm_stab,
    "poly_blend": poly_blend,
    "input_anchor": input_anchor,
    "uniform": uniform,
}
