"""The update rules: how a step computes the next iterate. Each rule is a pure function of the hidden states and g.

Every export has a copy of this file. It works on arrays of torch and of MLX: what differs between them is in g. Only
two rules, anderson and aitken, import torch. `looped_spec.RULES` declares the parameters and the cost of each rule. A
new rule needs a line there, and a function and a line in `UPDATES` here.

In every formula, x are the hidden states that enter the span, g(h) is one run of the span, h is the iterate (h = x
before the first step), s is the step size and K is the number of steps. All arrays are `(batch, seq, hidden)`.

Source: paper section 3; the rules besides euler from `_iterate_loop` of the authors' published `loop_qwen3.py`.
"""

from __future__ import annotations

from .looped_spec import LoopSpec


def run_loop(x, g, spec: LoopSpec):
    """The output of the loop: the anchor's blend of the natural pass and the last iterate.

        out = beta n + (1 - beta) h_K

    Blends are computed in the model's dtype. A step size of 1 and an anchor of 0 skip their arithmetic, so that naive
    looping is bitwise g applied K times.

    Args:
        x: the hidden states that enter the span, `(batch, seq, hidden)`.
        g: a `looped_body.Body`, or what stands for it elsewhere; its first call is the natural pass.
        spec: the loop.
    """
    h = UPDATES[spec.rule](g.placed(x), g, spec)
    return h if spec.anchor == 0 else spec.anchor * g.natural + (1 - spec.anchor) * h


def _euler(x, g, spec):
    """`h <- h + s (g(h) - h)`, K times: the paper's damped sub-step.

    With norm interpolation, rescale iterate k < K to the norm `|x| + (|n| - |x|) k/K`.
    """
    h, s = x, g.step_size
    for k in range(1, g.steps + 1):
        y = g(h)
        h = y if s == 1 else h + s * (y - h)
        if spec.norm_interpolation and k < g.steps:
            start, stop = g.norm(x), g.norm(g.natural)
            h = g.rescale(h, start + (stop - start) * (k / g.steps))
    return h


def _residual_scaled(x, g, spec):
    """`x + (g^K(x) - x) / K`."""
    h = x
    for _ in range(g.steps):
        h = g(h)
    return x + (h - x) / g.steps


def _ema(x, g, spec):
    """`h <- (1 - s) h + s g(h)`; with rule ema_sched, `s_k` of the schedule for s in step k."""
    h = x
    for s in spec.schedule or (g.step_size,) * g.steps:
        h = (1 - s) * h + s * g(h)
    return h


def _midpoint(x, g, spec):
    """`h <- h + s f(h + s/2 f(h))` with `f(h) = g(h) - h`."""
    h, s = x, g.step_size
    for _ in range(g.steps):
        middle = h + s / 2 * (g(h) - h)
        h = h + s * (g(middle) - middle)
    return h


def _heun(x, g, spec):
    """`h <- h + s/2 (k1 + k2)` with `k1 = f(h)`, `k2 = f(h + s k1)`, `f(h) = g(h) - h`."""
    h, s = x, g.step_size
    for _ in range(g.steps):
        k1 = g(h) - h
        end = h + s * k1
        h = h + s / 2 * (k1 + g(end) - end)
    return h


def _rk4(x, g, spec):
    """`h <- h + s/6 (k1 + 2 k2 + 2 k3 + k4)`: the classical Runge-Kutta step on `f(h) = g(h) - h`."""
    h, s = x, g.step_size
    for _ in range(g.steps):
        k1 = g(h) - h
        second = h + s / 2 * k1
        k2 = g(second) - second
        third = h + s / 2 * k2
        k3 = g(third) - third
        fourth = h + s * k3
        k4 = g(fourth) - fourth
        h = h + s / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return h


def _heavy_ball(x, g, spec):
    """`h <- h + s (g(h) - h) + momentum (h - h_previous)`."""
    h = previous = x
    momentum = 0.3 if spec.momentum is None else spec.momentum
    for _ in range(g.steps):
        h, previous = h + g.step_size * (g(h) - h) + momentum * (h - previous), h
    return h


def _anderson(x, g, spec):
    """`h <- h - (1 - s) dH mix + s (r - dR mix)`, where r = g(h) - h and mix minimises `|r - dR mix|`.

    dH and dR are the latest `history` differences of the iterates and of their residuals. The least-squares fit is over
    all tokens of the chunk at once. Like the authors' code, a step multiplies dH mix by (1 - s); Walker and Ni (2011)
    do not.
    """
    h, s, history = x, g.step_size, spec.history or 2
    points, residuals = [], []
    for _ in range(g.steps):
        points.append(h)
        residuals.append(g(h) - h)
        points, residuals = points[-history - 1 :], residuals[-history - 1 :]
        if len(points) == 1:
            h = h + s * residuals[-1]
            continue
        moves, changes = _differences(points), _differences(residuals)
        mix = _least_squares(changes, residuals[-1].float())
        h = h - (1 - s) * (moves @ mix).to(h.dtype) + s * (residuals[-1] - (changes @ mix).to(h.dtype))
    return h


def _differences(values):
    """Differences of consecutive values in fp32, `(batch, seq, hidden, len(values) - 1)`."""
    import torch

    return torch.stack([values[i + 1] - values[i] for i in range(len(values) - 1)], dim=-1).float()


def _least_squares(columns, target):
    """The mix that minimises `|target - columns mix|`, with slight Tikhonov regularisation; `(columns.shape[-1],)`."""
    import torch

    columns = columns.flatten(0, -2)
    gram = columns.T @ columns
    gram = gram + 1e-6 * gram.diagonal().max().clamp_min(1e-8) * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve(gram, columns.T @ target.flatten())


def _aitken(x, g, spec):
    """`h <- h - (g(h) - h)^2 / (g(g(h)) - 2 g(h) + h)` for each coordinate, in fp32: Aitken's delta-squared.

    A step moves a coordinate by at most |g(h) - h|, and by exactly g(h) - h if the denominator is close to 0.
    """
    import torch

    h = x
    for _ in range(g.steps // 2):
        once = g(h)
        twice = g(once)
        first, second = (once - h).float(), (twice - 2 * once + h).float()
        bends = second.abs() > 1e-3 * first.abs() + 1e-4
        step = torch.where(bends, -first * first / torch.where(bends, second, 1.0), first)
        h = (h.float() + step.clamp(-first.abs(), first.abs())).to(h.dtype)
    return h


def _norm_stab(x, g, spec):
    """`h <- (1 - s) h + s g(h)`, with each token rescaled to the norm of its x."""
    h, s = x, g.step_size
    for _ in range(g.steps):
        h = g.rescale((1 - s) * h + s * g(h), g.norm(x))
    return h


def _poly_blend(x, g, spec):
    """`w_0 x + w_1 g(x) + ... + w_K g^K(x)`, where w is the schedule."""
    h, blend = x, spec.schedule[0] * x
    for weight in spec.schedule[1:]:
        h = g(h)
        blend = blend + weight * h
    return blend


def _input_anchor(x, g, spec):
    """`h <- (1 - s) x + s g(h)`."""
    h, s = x, g.step_size
    for _ in range(g.steps):
        h = (1 - s) * x + s * g(h)
    return h


def _uniform(x, g, spec):
    """Replace each layer's output by the mean of its outputs so far, including this one."""
    h, sums = g(x), list(g.natural_outputs)
    for k in range(2, g.steps + 1):

        def mean(position, output, k=k):
            sums[position] = sums[position] + output
            return sums[position] / k

        h = g(h, replace=mean)
    return h


UPDATES = {
    "euler": _euler,
    "residual_scaled": _residual_scaled,
    "ema": _ema,
    "ema_sched": _ema,
    "midpoint": _midpoint,
    "heun": _heun,
    "rk4": _rk4,
    "heavy_ball": _heavy_ball,
    "anderson": _anderson,
    "aitken": _aitken,
    "norm_stab": _norm_stab,
    "poly_blend": _poly_blend,
    "input_anchor": _input_anchor,
    "uniform": _uniform,
}
