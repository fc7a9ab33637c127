"""The loop's fields: what each means, which values are allowed, and which rules there are.

Copied byte for byte into every exported directory; it needs the standard library alone.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise

MODES = ("block", "layer")
KV_POLICIES = ("shared", "per_step", "reference")
DECODE_MODES = ("full", "bypass", "first_n")

# Types of layers whose only memory is a K/V cache, as `layer_types` of native configs name them.
ATTENTION_TYPES = ("attention", "full_attention", "sliding_attention", "chunked_attention")

MAX_COUNT = 2**31 - 1  # of steps and the like: beyond any use, within what every number type can hold

FIELD_PREFIX = "loop_"


@dataclass(frozen=True)
class Rule:
    """What an update rule takes and costs; its arithmetic has the same name in `looped_rules.UPDATES`.

    Attributes:
        takes: the fields of `LoopSpec` that it uses besides `steps` and `anchor`.
        damping: the default of that field; None means 1/K.
        evaluations_per_step: how often one of the K steps runs the span.
        summary: the formula, in one line.
    """

    takes: tuple[str, ...]
    damping: float | None
    evaluations_per_step: int
    summary: str


RULES = {
    "euler": Rule(("damping", "norm_interpolation"), None, 1, "h + s (g(h) - h)"),
    "residual_scaled": Rule((), None, 1, "x + (g^K(x) - x) / K"),
    "ema": Rule(("damping",), 0.5, 1, "(1 - s) h + s g(h)"),
    "ema_sched": Rule(("schedule",), None, 1, "(1 - s_k) h + s_k g(h), with the K numbers of schedule for s_k"),
    "midpoint": Rule(("damping",), None, 2, "h + s f(h + s/2 f(h)), f(h) = g(h) - h"),
    "heun": Rule(("damping",), None, 2, "h + s/2 (k1 + k2), k1 = f(h), k2 = f(h + s k1)"),
    "rk4": Rule(("damping",), None, 4, "h + s/6 (k1 + 2 k2 + 2 k3 + k4), the classical Runge-Kutta step on f"),
    "heavy_ball": Rule(("damping", "momentum"), 0.5, 1, "h + s (g(h) - h) + momentum (h - h_previous)"),
    "anderson": Rule(("damping", "history"), 1.0, 1, "Anderson acceleration over the latest `history` differences"),
    "aitken": Rule((), None, 1, "Aitken's delta-squared on each coordinate, two evaluations at a time; K is even"),
    "norm_stab": Rule(("damping",), 0.5, 1, "(1 - s) h + s g(h), rescaled for each token to the norm of x"),
    "poly_blend": Rule(("schedule",), None, 1, "w_0 x + w_1 g(x) + ... + w_K g^K(x), with schedule for w"),
    "input_anchor": Rule(("damping",), 0.5, 1, "(1 - s) x + s g(h)"),
    "uniform": Rule((), None, 1, "each layer's output is the mean of its outputs so far"),
}


@dataclass(frozen=True)
class LoopSpec:
    """What is looped, and how. The one definition of the loop's fields; a config stores each as `loop_<name>`.

    With x the hidden states that enter the span, g(h) one run through it, s the step size and beta the anchor, the
    default rule is

        n       = g(x)                           the natural pass
        h_1     = x + s * (n - x)
        h_{k+1} = h_k + s * (g(h_k) - h_k)       k = 1 .. K-1
        out     = beta * n + (1 - beta) * h_K

    Another rule computes h_K in its own way, see `RULES`.

    Attributes:
        span: half-open range of decoder layers `(start, stop)`, counted from 0, or several in order that do not
            overlap; each loops by itself.
        steps: K, how many times g is evaluated, the natural pass included (midpoint and heun take 2 evaluations a
            step, rk4 4); 1 is the base model.
        damping: the step size s, in (0, 1]; None means the rule's default, 1/K for euler. 1 is naive looping.
        anchor: beta, the weight of the natural pass in the output, in [0, 1]; 1 is the base model.
        mode: "block" loops the span as one function, "layer" loops each of its layers in turn.
        kv: the K/V policy: which keys and values an iteration attends to. "shared": those of the natural pass, for
            every position; "per_step": its own, kept in extra cache slots, as a physically unrolled model does;
            "reference": the natural ones of the past and its own of the current chunk, as the paper's authors do.
        decode: which decode steps loop (single-token forwards on a cache that is not empty; all other forwards loop).
            "full": all; "bypass": none; "first_n": the first `first_n` after the latest longer chunk.
        first_n: number of decode steps that loop under `decode="first_n"`.
        rule: how the iterates are updated, one of `RULES`.
        schedule: K step sizes in [0, 1] for rule ema_sched; K+1 weights that sum to 1 for poly_blend; else None.
        momentum: for rule heavy_ball, in [0, 1); None means 0.3.
        history: for rule anderson, how many past differences it fits, 1 or more; None means 2.
        frozen_routing: iterations reuse the experts, and their weights, that the natural pass chose (sparse MoE).
        norm_interpolation: rescale every iterate but the last, for each token and in fp32, to the norm
            |x| + (|n| - |x|) * k/K; rule euler only.

    Raises:
        ValueError: a field is out of range, or two do not fit; the message says what is allowed.

    Source: paper section 3; rules, refinements, K/V policies and decode modes from the authors' published code
    (`loop_qwen3.py`, where layer mode with frozen routing and norm interpolation is `layer_anchored_frozen`).
    """

    span: tuple
    steps: int
    damping: float | None = None
    anchor: float = 0.0
    mode: str = "block"
    kv: str = "shared"
    decode: str = "full"
    first_n: int = 0
    rule: str = "euler"
    schedule: tuple[float, ...] | None = None
    momentum: float | None = None
    history: int | None = None
    frozen_routing: bool = False
    norm_interpolation: bool = False

    def __post_init__(self):
        for name in FIELDS:
            object.__setattr__(self, name, self.check_field(name, getattr(self, name)))
        for name in ("damping", "schedule", "momentum", "history", "norm_interpolation"):
            if getattr(self, name) not in (None, False) and name not in RULES[self.rule].takes:
                raise ValueError(f"rule {self.rule} takes no {name}; leave it out")
        if "schedule" in RULES[self.rule].takes and self.steps > 1:
            self._check_schedule()
        if self.rule == "aitken" and self.steps % 2 and self.steps > 1:
            raise ValueError(f"steps {self.steps} must be even for rule aitken, which takes two evaluations at a time")
        if self.rule == "anderson" and self.kv != "reference":
            raise ValueError(
                f"rule anderson fits one mix to all tokens of a chunk, so no cached decoding can equal a full forward: "
                f"kv {self.kv} cannot hold; use kv reference"
            )

    def _check_schedule(self):
        count, what = (self.steps, "steps") if self.rule == "ema_sched" else (self.steps + 1, "steps + 1")
        if self.schedule is None or len(self.schedule) != count:
            given = "none" if self.schedule is None else len(self.schedule)
            raise ValueError(f"rule {self.rule} needs a schedule of {count} numbers ({what}), not {given}")
        if self.rule == "poly_blend" and abs(sum(self.schedule) - 1) > 1e-6:
            raise ValueError(f"the schedule of rule poly_blend must sum to 1, not {sum(self.schedule):g}")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """All spans, also where there is only one."""
        return self.span if isinstance(self.span[0], tuple) else (self.span,)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of all layers that loop, in order."""
        return tuple(layer for start, stop in self.spans for layer in range(start, stop))

    @property
    def step_size(self) -> float:
        """The step size s: `damping`, or the rule's default. For euler that is 1/K: the integration time K*s is 1."""
        default = RULES[self.rule].damping
        chosen = default if self.damping is None else self.damping
        return 1.0 / self.steps if chosen is None else chosen

    @property
    def is_identity(self) -> bool:
        """Whether the looped model is the base model by definition (K = 1 or beta = 1)."""
        return self.steps == 1 or self.anchor == 1

    @property
    def evaluations(self) -> int:
        """How often each looped layer runs for one token that loops, the natural pass included."""
        return 1 if self.is_identity else self.steps * RULES[self.rule].evaluations_per_step

    @property
    def extra_kv_slots(self) -> int:
        """Cache slots beyond one per layer: one for each looped layer and iteration under `per_step`, else none."""
        return (self.evaluations - 1) * len(self.layers) if self.kv == "per_step" else 0

    def check_depth(self, num_layers: int) -> None:
        """Raise ValueError unless the spans lie inside a model of `num_layers` decoder layers."""
        start, stop = self.spans[-1]
        if stop > num_layers:
            raise ValueError(
                f"span {start}:{stop} ends outside the model, which has {num_layers} layers; "
                f"a span is half-open and may end at {num_layers} at most"
            )

    def check_layer_types(self, layer_types) -> None:
        """Raise ValueError unless keys and values are all that the looped layers keep of the past.

        Args:
            layer_types: the config's `layer_types` or `layers_block_type`, one name per layer; None where it has none.
        """
        if not isinstance(layer_types, (list, tuple)) or len(layer_types) <= self.layers[-1]:
            return
        for layer in self.layers:
            if layer_types[layer] not in ATTENTION_TYPES:
                raise ValueError(
                    f"layer {layer} is of type {layer_types[layer]}; only layers whose memory is a K/V cache can be "
                    f"run again ({', '.join(ATTENTION_TYPES)}): choose a span of those"
                )

    @classmethod
    def from_config(cls, config) -> LoopSpec:
        """The spec stored in a config object's `loop_*` attributes.

        Raises:
            ValueError: a field is missing or out of range.
        """
        missing = [FIELD_PREFIX + name for name in FIELDS if not hasattr(config, FIELD_PREFIX + name)]
        if missing:
            raise ValueError(f"config has no {missing[0]}; convert the base model again")
        return cls(**{name: getattr(config, FIELD_PREFIX + name) for name in FIELDS})

    def to_config_fields(self) -> dict:
        """The `loop_*` entries of `config.json`."""
        return {FIELD_PREFIX + name: as_json(getattr(self, name)) for name in FIELDS}

    @staticmethod
    def check_field(name: str, value):
        """Return `value` of the field `name` in its canonical type.

        Raises:
            ValueError: there is no such field, or the value is not allowed.
        """
        if name not in FIELDS:
            raise ValueError(
                f"{FIELD_PREFIX}{name} is no field of the loop; after {FIELD_PREFIX} comes one of {', '.join(FIELDS)}"
            )
        return _FIELD_CHECKS[name](value)


FIELDS = tuple(field.name for field in fields(LoopSpec))


def as_json(value):
    """A field's value as JSON has it: lists for tuples."""
    return [as_json(each) for each in value] if isinstance(value, tuple) else value


def _check_span(value) -> tuple:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(each, (list, tuple)) for each in value):
        return _check_bounds(value)
    spans = tuple(_check_bounds(each) for each in value)
    for (start, stop), (next_start, next_stop) in pairwise(spans):
        if next_start < stop:
            raise ValueError(
                f"spans {start}:{stop} and {next_start}:{next_stop} overlap or are out of order; give them in order"
            )
    return spans if len(spans) > 1 else spans[0]


def _check_bounds(value) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_int(bound) for bound in value):
        raise ValueError(f"span {value!r} is not a pair of layer numbers [start, stop]")
    start, stop = value
    if start < 0:
        raise ValueError(f"span {start}:{stop} starts before the first layer, which is 0")
    if start >= stop:
        kind = "is empty" if start == stop else "is reversed"
        raise ValueError(f"span {start}:{stop} {kind}; give start:stop with start < stop (stop is not included)")
    return (start, stop)


def _check_steps(value) -> int:
    if not _is_count(value, least=1):
        raise ValueError(
            f"steps {value!r} must be a whole number of 1 or more (1 is the base model, {MAX_COUNT} the most)"
        )
    return value


def _check_damping(value) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"damping {value!r} must be a step size in (0, 1], or left out for the rule's default")
    return float(value)


def _check_anchor(value) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"anchor {value!r} must be a weight in [0, 1] (1 is the base model)")
    return float(value)


def _check_first_n(value) -> int:
    if not _is_count(value, least=0):
        raise ValueError(f"first_n {value!r} must be a whole number of 0 or more, {MAX_COUNT} at most")
    return value


def _check_schedule_numbers(value) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(_is_number(each) and 0 <= each <= 1 for each in value):
        raise ValueError(f"schedule {value!r} must be a list of numbers in [0, 1]")
    return tuple(float(each) for each in value)


def _check_momentum(value) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"momentum {value!r} must be a number in [0, 1)")
    return float(value)


def _check_history(value) -> int | None:
    if value is None:
        return None
    if not _is_count(value, least=1):
        raise ValueError(f"history {value!r} must be a whole number of 1 or more, {MAX_COUNT} at most")
    return value


def _one_of(name: str, allowed):
    def check(value) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} {value!r} must be one of {', '.join(allowed)}")
        return value

    return check


def _flag(name: str):
    def check(value) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} {value!r} must be true or false")
        return value

    return check


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value, least: int) -> bool:
    return _is_int(value) and least <= value <= MAX_COUNT


def _is_number(value) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


_FIELD_CHECKS = {
    "span": _check_span,
    "steps": _check_steps,
    "damping": _check_damping,
    "anchor": _check_anchor,
    "mode": _one_of("mode", MODES),
    "kv": _one_of("kv", KV_POLICIES),
    "decode": _one_of("decode", DECODE_MODES),
    "first_n": _check_first_n,
    "rule": _one_of("rule", RULES),
    "schedule": _check_schedule_numbers,
    "momentum": _check_momentum,
    "history": _check_history,
    "frozen_routing": _flag("frozen_routing"),
    "norm_interpolation": _flag("norm_interpolation"),
}
