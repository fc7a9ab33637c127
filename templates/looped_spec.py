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
    check_schedule_numbers,
    check_span,
    check_steps,
    flag,
    one_of,
)

MODES = ("block", "layer")
KV_POLICIES = ("shared", "per_step", "reference")
DECODE_MODES = ("full", "bypass", "first_n")

# Names in `layer_types` of native configs for layers whose only memory is a K/V cache, of an indexer's keys too.
ATTENTION_TYPES = ("attention", "full_attention", "sliding_attention", "chunked_attention", "indexed_attention")

# The same for layers that keep a recurrent state, alone or beside keys and values; and for layers without a memory.
RECURRENT_TYPES = ("linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding")
MEMORYLESS_TYPES = ("mlp", "moe")
# And for layers that pool several tokens into one key, and keep the tokens of an unfinished pool too.
POOLING_TYPES = ("heavily_compressed_attention", "compressed_sparse_attention")
LOOPABLE_TYPES = ATTENTION_TYPES + RECURRENT_TYPES + MEMORYLESS_TYPES + POOLING_TYPES

# In a `vision_config`: layers of the tower whose features the model adds to outputs of as many first decoder layers.
ADDED_FEATURES = "deepstack_visual_indexes"
# In a `text_config`: the layers that attend to an image instead of the text.
CROSS_ATTENTION = "cross_attention_layers"

FIELD_PREFIX = "loop_"


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
            without overlap, each of which loops by itself.
        steps: K, how many times g is evaluated, including the natural pass (midpoint and heun take 2 evaluations per
            step, rk4 takes 4); 1 is the base model.
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

    Raises:
        ValueError: a field is out of range, or two fields do not fit together; the message says what is allowed.

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
                raise ValueError(f"rule {self.rule} does not use {name}; leave it out")
        if "schedule" in RULES[self.rule].takes and self.steps > 1:
            self._check_schedule()
        if self.rule == "aitken" and self.steps % 2 and self.steps > 1:
            raise ValueError(f"steps {self.steps} must be even for rule aitken, which takes two evaluations at a time")
        if self.rule in UNSTABLE_RULES and self.kv != "reference":
            raise ValueError(
                f"rule {self.rule} {UNSTABLE_RULES[self.rule]}, so cached decoding cannot equal a full forward, "
                f"which kv {self.kv} promises; use kv reference"
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
        """All spans, as a tuple even if there is only one."""
        return self.span if isinstance(self.span[0], tuple) else (self.span,)

    def spans_within(self, num_layers: int) -> list[tuple[int, int]]:
        """The spans that end within the first `num_layers` layers: a model that exits early runs no more layers."""
        return [(start, stop) for start, stop in self.spans if stop <= num_layers]

    @property
    def bodies(self) -> tuple[tuple[int, int], ...]:
        """The ranges of layers that loop as one function: the spans in block mode, each layer in layer mode."""
        return self.spans if self.mode == "block" else tuple((layer, layer + 1) for layer in self.layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of all looped layers, in order."""
        return tuple(layer for start, stop in self.spans for layer in range(start, stop))

    @property
    def step_size(self) -> float:
        """The step size s: `damping` or the rule's default. With euler's default 1/K, the integration time K*s is 1."""
        default = RULES[self.rule].damping
        chosen = default if self.damping is None else self.damping
        return 1.0 / self.steps if chosen is None else chosen

    @property
    def is_identity(self) -> bool:
        """Whether the looped model is bitwise the base model: K = 1 or beta = 1."""
        return self.steps == 1 or self.anchor == 1

    @property
    def evaluations(self) -> int:
        """How many times each looped layer runs for a token that loops, including the natural pass."""
        return 1 if self.is_identity else self.steps * RULES[self.rule].evaluations_per_step

    @property
    def extra_kv_slots(self) -> int:
        """Number of cache slots beyond one per layer: with `per_step`, one for each looped layer and iteration."""
        return (self.evaluations - 1) * len(self.layers) if self.kv == "per_step" else 0

    def check_depth(self, num_layers: int) -> None:
        """Raise ValueError unless the spans lie inside a model of `num_layers` decoder layers."""
        start, stop = self.spans[-1]
        if stop > num_layers:
            raise ValueError(
                f"span {start}:{stop} ends outside the model, which has {num_layers} layers; "
                f"a span is half-open and can end at {num_layers} at most"
            )

    def check_added_features(self, vision_layers) -> None:
        """Raise ValueError if the model adds features of images inside of what loops: iterations would miss them.

        Args:
            vision_layers: the value of `ADDED_FEATURES` in the config; None if it has none.
        """
        count = len(vision_layers) if isinstance(vision_layers, (list, tuple)) else 0
        for start, stop in self.bodies:
            if start < min(stop - 1, count):
                raise ValueError(
                    f"the model adds features of images to the hidden states after each of its first {count} layers, "
                    f"inside span {start}:{stop}; choose a span that starts at {count}, or mode layer"
                )

    def check_cross_attention(self, crossed) -> None:
        """Raise ValueError if a looped layer attends to an image: the model skips it where there is none.

        Args:
            crossed: the numbers of such layers, the value of `CROSS_ATTENTION` in the config; None if it has none.
        """
        found = [layer for layer in self.layers if isinstance(crossed, (list, tuple)) and layer in crossed]
        if found:
            raise ValueError(
                f"layer {found[0]} attends to an image, and the model skips it for text alone, so it cannot be run "
                f"again; choose a span without layers {', '.join(map(str, crossed))}"
            )

    def check_layer_types(self, layer_types) -> None:
        """Raise ValueError if a looped layer has a memory of unknown kind.

        Args:
            layer_types: the config's `layer_types` or `layers_block_type`, one name per layer; None if it has none.
        """
        if not isinstance(layer_types, (list, tuple)) or len(layer_types) <= self.layers[-1]:
            return
        for layer in self.layers:
            if layer_types[layer] in POOLING_TYPES and self.kv == "reference" and not self.is_identity:
                raise ValueError(
                    f"layer {layer} is of type {layer_types[layer]}: it pools several tokens into one key, and a pool "
                    "cannot join natural tokens with an iterate's, as kv reference asks; use kv shared or per_step"
                )
            if layer_types[layer] not in LOOPABLE_TYPES:
                raise ValueError(
                    f"layer {layer} is of type {layer_types[layer]}; only layers of types {', '.join(LOOPABLE_TYPES)} "
                    "can be run again: choose a span of those"
                )

    @classmethod
    def from_config(cls, config) -> LoopSpec:
        """The spec in a config object's `loop_*` attributes.

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
        """Check the value of one field and return it in its canonical type.

        Raises:
            ValueError: there is no such field, or the value is not allowed; the message says what is.
        """
        if name not in FIELDS:
            raise ValueError(
                f"{FIELD_PREFIX}{name} is not a field of the loop; use {FIELD_PREFIX} with one of {', '.join(FIELDS)}"
            )
        return _FIELD_CHECKS[name](value)


FIELDS = tuple(field.name for field in fields(LoopSpec))


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
}
