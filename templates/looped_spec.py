"""The fields of the loop, their meaning and allowed values, and the table of update rules.

Every export has a copy of this file. It needs only the standard library.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .looped_fields import (
    check_anchor,
    check_damping,
    check_first_n,
    check_history,
    check_momentum,
    check_path_runs,
    check_schedule_numbers,
    check_span,
    check_steps,
    flag,
    one_of,
)
from .looped_path import BodySpec, detours_of, extra_slots_of, runs_of, skipped_by

Steps = int | tuple[int, ...]  # K: one number, or one for each span

MODES = ("block", "layer")
KV_POLICIES = ("shared", "per_step", "reference")
DECODE_MODES = ("full", "bypass", "first_n")

FIELD_PREFIX = "loop_"
OPTIONAL_FIELDS = ("path",)  # a config has these only if they are not None


@dataclass(frozen=True)
class Rule:
    """Parameters and cost of an update rule; `looped_rules.UPDATES` has its arithmetic under the same name.

    Attributes:
        takes: the fields of `LoopSpec` that it uses, besides `steps` and `anchor`.
        damping: its default step size; None means 1/K.
        evaluations_per_step: how many times one step runs the span.
        summary: its formula in one line.
    """

    takes: tuple[str, ...]
    damping: float | None
    evaluations_per_step: int
    summary: str


RULES = {
    "euler": Rule(("damping", "norm_interpolation"), None, 1, "h + s (g(h) - h)"),
    "residual_scaled": Rule((), None, 1, "x + (g^K(x) - x) / K"),
    "ema": Rule(("damping",), 0.5, 1, "(1 - s) h + s g(h)"),
    "ema_sched": Rule(("schedule",), None, 1, "(1 - s_k) h + s_k g(h), where s_1 ... s_K is the schedule"),
    "midpoint": Rule(("damping",), None, 2, "h + s f(h + s/2 f(h)), f(h) = g(h) - h"),
    "heun": Rule(("damping",), None, 2, "h + s/2 (k1 + k2), k1 = f(h), k2 = f(h + s k1)"),
    "rk4": Rule(("damping",), None, 4, "h + s/6 (k1 + 2 k2 + 2 k3 + k4), the classical Runge-Kutta step on f"),
    "heavy_ball": Rule(("damping", "momentum"), 0.5, 1, "h + s (g(h) - h) + momentum (h - h_previous)"),
    "anderson": Rule(("damping", "history"), 1.0, 1, "Anderson acceleration over the latest `history` differences"),
    "aitken": Rule((), None, 1, "Aitken's delta-squared on each coordinate, two evaluations at a time; K must be even"),
    "norm_stab": Rule(("damping",), 0.5, 1, "(1 - s) h + s g(h), rescaled for each token to the norm of x"),
    "poly_blend": Rule(("schedule",), None, 1, "w_0 x + w_1 g(x) + ... + w_K g^K(x), where w is the schedule"),
    "input_anchor": Rule(("damping",), 0.5, 1, "(1 - s) x + s g(h)"),
    "uniform": Rule((), None, 1, "each layer's output is the mean of its outputs so far"),
}

# Rules under which cached decoding cannot equal a full forward, and why.
UNSTABLE_RULES = {
    "anderson": "fits one mix to all tokens of a chunk",
    "aitken": "jumps where the curvature of the iterates is near its threshold, so rounding decides between two steps",
}


@dataclass(frozen=True)
class LoopSpec:
    """The loop: which layers are looped, and how. A config stores each field as `loop_<name>`.

    Let x be the hidden states that enter the span, g(h) one run of h through it, s the step size and beta the anchor.
    The default rule is

        n       = g(x)                           the natural pass
        h_1     = x + s * (n - x)
        h_{k+1} = h_k + s * (g(h_k) - h_k)       k = 1 .. K-1
        out     = beta * n + (1 - beta) * h_K

    Other rules compute h_K in another way; see `RULES`.

    Attributes:
        span: half-open range of decoder layers `(start, stop)`, counted from 0; or several such ranges, in order and
            without overlap, each of which loops by itself; None if there is a path.
        steps: K, how many times g is evaluated, including the natural pass (midpoint and heun take 2 evaluations per
            step, rk4 takes 4); 1 is the base model. Spans may differ in it: then one number for each span.
        damping: the step size s, in (0, 1]; None means the rule's default, 1/K for euler. 1 is naive looping.
        anchor: beta, the weight of the natural pass in the output, in [0, 1]; 1 is the base model.
        mode: "block" loops the span as one function, "layer" loops each of its layers in turn.
        kv: the K/V policy: which keys and values an iteration attends to. "shared": the natural pass's, for every
            position; "per_step": its own, kept in extra cache slots, like a physically unrolled model; "reference": the
            natural pass's for the past and its own for the current chunk, like the paper's authors.
        decode: which decode steps loop. A decode step is a forward of one token on a cache that is not empty; all other
            forwards loop. "full": all; "bypass": none; "first_n": the first `first_n` after the latest longer chunk.
        first_n: number of decode steps that loop under `decode="first_n"`.
        rule: the update rule, one of `RULES`.
        schedule: K step sizes in [0, 1] for rule ema_sched; K+1 weights that sum to 1 for poly_blend; else None.
        momentum: for rule heavy_ball, in [0, 1); None means 0.3.
        history: for rule anderson, the number of past differences in its fit, 1 or more; None means 2.
        frozen_routing: for sparse MoE, iterations reuse the natural pass's choice of experts and their weights.
        norm_interpolation: for rule euler, rescale iterate k < K, for each token and in fp32, to the norm
            |x| + (|n| - |x|) * k/K.
        path: instead of a span, the layers that a token visits, in order, as half-open ranges: ((0, 15), (12, 40))
            visits layers 12 to 14 twice. Layers may be left out, but are first visited in their own order. Every visit
            runs the layer as it is: there is no damping, and steps is 2, or 1 for the base model.

    Raises:
        ValueError: a field is out of range, or two fields do not fit together; the message says what is allowed.

    Source: paper section 3; rules, refinements, K/V policies and decode modes from the authors' published code
    (`loop_qwen3.py`, where layer mode with frozen routing and norm interpolation is `layer_anchored_frozen`).
    """

    span: tuple | None
    steps: Steps
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
    path: tuple | None = None

    def __post_init__(self):
        for name in FIELDS:
            object.__setattr__(self, name, self.check_field(name, getattr(self, name)))
        if self.path is None:
            self._check_spans()
        else:
            self._check_path()
        for name in ("damping", "schedule", "momentum", "history", "norm_interpolation"):
            if getattr(self, name) not in (None, False) and name not in RULES[self.rule].takes:
                raise ValueError(f"rule {self.rule} does not use {name}; leave it out")
        if "schedule" in RULES[self.rule].takes and self.steps != 1:
            self._check_schedule()
        odd = [steps for steps in self.steps_of_spans if steps % 2 and steps > 1]
        if self.rule == "aitken" and odd:
            raise ValueError(f"steps {odd[0]} must be even for rule aitken, which takes two evaluations at a time")
        if self.rule in UNSTABLE_RULES and self.kv != "reference":
            raise ValueError(
                f"rule {self.rule} {UNSTABLE_RULES[self.rule]}, so cached decoding cannot equal a full forward, "
                f"which kv {self.kv} promises; use kv reference"
            )

    def _check_spans(self):
        if self.span is None:
            raise ValueError("the loop has neither a span nor a path; give one of them")
        if isinstance(self.steps, tuple) and len(self.steps) != len(self.spans):
            raise ValueError(
                f"there are {len(self.steps)} numbers of steps for {len(self.spans)} spans; give one for each, or one"
            )

    def _check_path(self):
        if self.span is not None:
            raise ValueError("the loop has a span and a path; give one of them")
        for name in NOT_ON_PATHS:
            default = getattr(type(self), name)
            if getattr(self, name) not in (default, 1.0 if name == "damping" else default):
                raise ValueError(f"a path runs each layer as it is, without {name}; leave it out, or give spans")
        if self.steps not in (1, 2):
            raise ValueError(
                f"a path says how often each layer runs, so steps is 2, or 1 for the base model, not {self.steps}"
            )

    def _check_schedule(self):
        if isinstance(self.steps, tuple):
            raise ValueError(f"rule {self.rule} has one schedule, so all spans need the same number of steps")
        count, what = (self.steps, "steps") if self.rule == "ema_sched" else (self.steps + 1, "steps + 1")
        if self.schedule is None or len(self.schedule) != count:
            given = "none" if self.schedule is None else len(self.schedule)
            raise ValueError(f"rule {self.rule} needs a schedule of {count} numbers ({what}), not {given}")
        if self.rule == "poly_blend" and abs(sum(self.schedule) - 1) > 1e-6:
            raise ValueError(f"the schedule of rule poly_blend must sum to 1, not {sum(self.schedule):g}")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """All spans, as a tuple even if there is only one; none if there is a path."""
        if self.span is None:
            return ()
        return self.span if isinstance(self.span[0], tuple) else (self.span,)

    @property
    def steps_of_spans(self) -> tuple[int, ...]:
        """K of each span; of a path, the one number."""
        return self.steps if isinstance(self.steps, tuple) else (self.steps,) * max(len(self.spans), 1)

    @property
    def bodies(self) -> tuple[BodySpec, ...]:
        """What loops as one function: the spans in block mode, each layer in layer mode; the detours of a path."""
        if self.path is not None:
            return tuple(self._body(layers, after, self.steps) for after, layers in detours_of(self.path))
        spans = [(tuple(range(*span)), steps) for span, steps in zip(self.spans, self.steps_of_spans, strict=True)]
        if self.mode == "layer":
            spans = [((layer,), steps) for layers, steps in spans for layer in layers]
        return tuple(self._body(layers, layers[-1], steps) for layers, steps in spans)

    def _body(self, layers, after: int, steps) -> BodySpec:
        evaluations = 1 if self.anchor == 1 else steps * (RULES[self.rule].evaluations_per_step if steps > 1 else 1)
        return BodySpec(layers, after, steps, self._step_size(steps), evaluations)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of all looped layers, in order."""
        return tuple(self.runs)

    @property
    def runs(self) -> dict[int, int]:
        """How many times each looped layer runs for a token that loops, including the natural pass; in order."""
        return runs_of(self.bodies)

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of the layers that a token never visits, in a model of `num_layers` layers."""
        return () if self.path is None or self.is_identity else skipped_by(self.path, num_layers)

    def layer_runs(self, num_layers: int) -> list[int]:
        """How many times each layer of a model of `num_layers` layers runs for a token that loops."""
        runs, skipped = self.runs, self.skipped(num_layers)
        return [0 if layer in skipped else runs.get(layer, 1) for layer in range(num_layers)]

    @property
    def step_size(self) -> float | tuple[float, ...]:
        """The step size s: `damping` or the rule's default. With euler's default 1/K, the integration time K*s is 1.

        If spans differ in K, so may they in s: then one for each span.
        """
        sizes = tuple(self._step_size(steps) for steps in self.steps_of_spans)
        return sizes if isinstance(self.steps, tuple) and len(set(sizes)) > 1 else sizes[0]

    def _step_size(self, steps: int) -> float:
        default = RULES[self.rule].damping
        chosen = default if self.damping is None else self.damping
        if self.path is not None:
            return 1.0
        return 1.0 / steps if chosen is None else chosen

    @property
    def is_identity(self) -> bool:
        """Whether the looped model is bitwise the base model: K = 1 or beta = 1."""
        return self.steps == 1 or self.anchor == 1

    @property
    def has_extra_slots(self) -> bool:
        """Whether iterations have cache slots of their own."""
        return self.kv == "per_step" and any(body.evaluations > 1 for body in self.bodies)

    @property
    def extra_slots(self) -> tuple[tuple[int, int], ...]:
        """With `per_step`, the layer and the iteration of each cache slot beyond one per layer, in order."""
        return extra_slots_of(self.bodies) if self.kv == "per_step" else ()

    @classmethod
    def from_config(cls, config) -> LoopSpec:
        """The spec in a config object's `loop_*` attributes.

        Raises:
            ValueError: a field is missing or out of range.
        """
        given = [name for name in FIELDS if hasattr(config, FIELD_PREFIX + name)]
        missing = [FIELD_PREFIX + name for name in FIELDS if name not in (*given, *OPTIONAL_FIELDS)]
        if missing:
            raise ValueError(f"config has no {missing[0]}; convert the base model again")
        return cls(**{name: getattr(config, FIELD_PREFIX + name) for name in given})

    def to_config_fields(self) -> dict:
        """The `loop_*` entries of `config.json`."""
        values = {name: as_json(getattr(self, name)) for name in FIELDS}
        return {
            FIELD_PREFIX + name: value
            for name, value in values.items()
            if value is not None or name not in OPTIONAL_FIELDS
        }

    @staticmethod
    def check_field(name: str, value):
        """Check the value of one field and return it in its canonical type.

        Raises:
            ValueError: there is no such field, or the value is not allowed; the message says what is.
        """
        if name not in FIELDS:
            raise ValueError(
                f"{FIELD_PREFIX}{name} is not a field of the loop; use {FIELD_PREFIX} with one of {', '.join(FIELDS)}"
            )
        return _FIELD_CHECKS[name](value)


def bodies_within(spec: LoopSpec, num_layers: int) -> list[BodySpec]:
    """What loops within the first `num_layers` layers: a model that exits early runs no more layers."""
    return [body for body in spec.bodies if body.after < num_layers and body.evaluations > 1]


def first_of(spec: LoopSpec) -> int:
    """The number of the first looped layer, whose cache slot tells whether tokens were stored; 0 if none loops."""
    return spec.layers[0] if spec.layers else 0


FIELDS = tuple(field.name for field in fields(LoopSpec))


# Fields that change how a span loops: a path has nothing to do with them.
NOT_ON_PATHS = (
    "damping", "anchor", "mode", "rule", "schedule", "momentum", "history", "frozen_routing", "norm_interpolation",
)  # fmt: skip


def as_json(value):
    """A field's value for JSON, with lists for tuples."""
    return [as_json(each) for each in value] if isinstance(value, tuple) else value


_FIELD_CHECKS = {
    "span": check_span,
    "steps": check_steps,
    "damping": check_damping,
    "anchor": check_anchor,
    "mode": one_of("mode", MODES),
    "kv": one_of("kv", KV_POLICIES),
    "decode": one_of("decode", DECODE_MODES),
    "first_n": check_first_n,
    "rule": one_of("rule", RULES),
    "schedule": check_schedule_numbers,
    "momentum": check_momentum,
    "history": check_history,
    "frozen_routing": flag("frozen_routing"),
    "norm_interpolation": flag("norm_interpolation"),
    "path": check_path_runs,
}
