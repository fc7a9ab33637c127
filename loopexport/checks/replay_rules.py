"""The update rules of the loop by hand, written from their formulas a second time: no code of the templates is used.

In every formula, x are the hidden states that enter the span, g(h) is one run of the span, n = g(x) is the natural
pass, h is the iterate (h = x before the first step), s is the step size and K the number of steps. The first call of g
returns n. All tensors are `(batch, seq, hidden)`.

Blends are computed in the model's dtype; norms, Aitken's quotients and Anderson's fit in fp32.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from loopexport.loop.spec import LoopSpec

from .replay_bodies import steps_of

TINY_NORM = 1e-6  # norms below it count as this


def by_hand(x, outputs, g, spec: LoopSpec):
    """The output of the loop: `beta n + (1 - beta) h_K`.

    Args:
        x: the hidden states that enter the span.
        outputs: each layer's output in the natural pass; the last is n.
        g: runs the span; `g(h, each)` replaces the output of the layer at `position` by `each(position, output)`.
        spec: the loop.
    """
    h = RULES[spec.rule](x, outputs, g, spec)
    beta = spec.anchor
    return beta * outputs[-1] + (1 - beta) * h if beta else h


def _euler(x, outputs, g, spec):
    """`h <- h + s (g(h) - h)`; norms of the iterates before the last go from |x| to |n| in K equal steps."""
    h, s = x, _step_size(spec)
    from_norm, to_norm = _norm(x), _norm(outputs[-1])
    for k in range(1, spec.steps + 1):
        h = _towards(h, g(h), s)
        if spec.norm_interpolation and k < spec.steps:
            h = _with_norm(h, from_norm + (to_norm - from_norm) * (k / spec.steps))
    return h


def _towards(h, y, s: float):
    return y if s == 1 else h + s * (y - h)


def _residual_scaled(x, outputs, g, spec):
    """`x + (g^K(x) - x) / K`."""
    return x + (_powers(x, g, spec.steps)[-1] - x) / spec.steps


def _powers(x, g, count: int) -> list:
    """x, g(x), g(g(x)), ... up to `count` applications."""
    powers = [x]
    for _ in range(count):
        powers.append(g(powers[-1]))
    return powers


def _ema(x, outputs, g, spec):
    """`h <- (1 - s) h + s g(h)`."""
    return _ema_sched(x, outputs, g, spec, [_step_size(spec, 0.5)] * spec.steps)


def _ema_sched(x, outputs, g, spec, schedule=None):
    """`h <- (1 - s_k) h + s_k g(h)`."""
    h = x
    for s in schedule or spec.schedule:
        h = (1 - s) * h + s * g(h)
    return h


def _input_anchor(x, outputs, g, spec):
    """`h <- (1 - s) x + s g(h)`."""
    h, s = x, _step_size(spec, 0.5)
    for _ in range(spec.steps):
        h = (1 - s) * x + s * g(h)
    return h


def _runge_kutta(nodes: tuple[float, ...], weights: tuple[float, ...]):
    """An explicit Runge-Kutta step on `f(h) = g(h) - h`.

    Slope i is f at h moved by `nodes[i]` steps along the slope before; `weights` are the parts of the slopes.
    """

    def update(x, outputs, g, spec):
        h, s = x, _step_size(spec)
        for _ in range(spec.steps):
            slopes: list = []
            for node in nodes:
                at = h + s * node * slopes[-1] if slopes else h
                slopes.append(g(at) - at)
            h = h + s * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        return h

    return update


def _heavy_ball(x, outputs, g, spec):
    """`h <- h + s (g(h) - h) + momentum (h - h_previous)`."""
    before, h, s = x, x, _step_size(spec, 0.5)
    momentum = 0.3 if spec.momentum is None else spec.momentum
    for _ in range(spec.steps):
        before, h = h, h + s * (g(h) - h) + momentum * (h - before)
    return h


def _anderson(x, outputs, g, spec):
    """`h <- h + s r - ((1 - s) dH + s dR) mix`, r = g(h) - h, where mix minimises |r - dR mix| over the chunk.

    dH and dR are the last differences of the iterates and of their residuals, at most `history` of them.
    """
    h, s, history = x, _step_size(spec, 1.0), spec.history or 2
    iterates, residuals = [], []
    for _ in range(spec.steps):
        iterates.append(h)
        residuals.append(g(h) - h)
        moves, changes = _latest_differences(iterates, history), _latest_differences(residuals, history)
        step = s * residuals[-1]
        if moves:
            mix = _fit(changes, residuals[-1])
            step = step - (1 - s) * _mixed(moves, mix).to(h.dtype) - s * _mixed(changes, mix).to(h.dtype)
        h = h + step
    return h


def _latest_differences(values: list, count: int) -> list:
    pairs = list(pairwise(values))[-count:]
    return [(after - before).float() for before, after in pairs]


def _mixed(columns: list, mix):
    return sum(weight * column for weight, column in zip(mix, columns, strict=True))


def _fit(columns: list, target):
    """Least squares by the normal equations, with 1e-6 of the largest diagonal element added to the diagonal."""
    matrix = torch.stack([column.flatten() for column in columns])
    gram = matrix @ matrix.T
    ridge = 1e-6 * gram.diagonal().max().clamp_min(1e-8)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)), matrix @ target.float().flatten())


def _aitken(x, outputs, g, spec):
    """`h <- h - f^2 / (g(g(h)) - 2 g(h) + h)`, f = g(h) - h: at most |f| away, and f where the quotient is unstable."""
    h = x
    for _ in range(spec.steps // 2):
        _, once, twice = _powers(h, g, 2)
        f, bend = (once - h).float(), (twice - 2 * once + h).float()
        is_stable = bend.abs() > 1e-3 * f.abs() + 1e-4
        jump = torch.where(is_stable, -f * f / bend.where(is_stable, torch.ones_like(bend)), f)
        h = (h.float() + jump.clamp(-f.abs(), f.abs())).to(h.dtype)
    return h


def _norm_stab(x, outputs, g, spec):
    """`h <- (1 - s) h + s g(h)`, rescaled to |x| for each token."""
    h, s = x, _step_size(spec, 0.5)
    for _ in range(spec.steps):
        h = _with_norm((1 - s) * h + s * g(h), _norm(x))
    return h


def _poly_blend(x, outputs, g, spec):
    """`w_0 x + w_1 g(x) + ... + w_K g^K(x)`."""
    return _mixed(_powers(x, g, spec.steps), spec.schedule)


def _uniform(x, outputs, g, spec):
    """Each layer's output is the mean of its outputs so far."""
    seen = [[output] for output in outputs]

    def mean(position, output):
        seen[position].append(output)
        return sum(seen[position]) / len(seen[position])

    h = g(x)
    for _ in range(1, spec.steps):
        h = g(h, mean)
    return h


def _step_size(spec: LoopSpec, default: float | None = None) -> float:
    """s: the damping, or the rule's default, which is 1/K unless the rule has its own."""
    if spec.damping is not None:
        return spec.damping
    return 1 / steps_of(spec) if default is None else default


def _norm(h):
    """Euclidean norm of each token, `(batch, seq, 1)`, in fp32."""
    return h.float().norm(dim=-1, keepdim=True).clamp_min(TINY_NORM)


def _with_norm(h, norm):
    return (h.float() * (norm / _norm(h))).to(h.dtype)


RULES = {
    "euler": _euler,
    "residual_scaled": _residual_scaled,
    "ema": _ema,
    "ema_sched": _ema_sched,
    "midpoint": _runge_kutta((0, 1 / 2), (0, 1)),
    "heun": _runge_kutta((0, 1), (1 / 2, 1 / 2)),
    "rk4": _runge_kutta((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "heavy_ball": _heavy_ball,
    "anderson": _anderson,
    "aitken": _aitken,
    "norm_stab": _norm_stab,
    "poly_blend": _poly_blend,
    "input_anchor": _input_anchor,
    "uniform": _uniform,
}
