"""Configuration of a looped causal language model: the loop's fields, and one config class per base family.

Copied byte for byte into every exported directory, so it needs `transformers` and nothing else. All variation is in
`config.json`: the base's own fields, `model_type: looped_<base type>`, and the `loop_*` fields defined by `LoopSpec`.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise

# Start of the sha256 of modeling_looped.py. transformers 5 tells local code apart by this file alone: without it, two
# exports of one directory name with different modeling code would share, in one process, whichever was loaded first.
MODELING_DIGEST = "7d9ec7e9f445930d"

MODES = ("block", "layer")
KV_POLICIES = ("shared", "per_step", "reference")
DECODE_MODES = ("full", "bypass", "first_n")

# Types of layers whose only memory is a K/V cache, as `layer_types` of native configs name them.
ATTENTION_TYPES = ("attention", "full_attention", "sliding_attention", "chunked_attention")

MAX_COUNT = 2**31 - 1  # of steps and the like: beyond any use, within what every number type can hold

FIELD_PREFIX = "loop_"
MODEL_TYPE_PREFIX = "looped_"
CLASS_PREFIX = "Looped"


@dataclass(frozen=True)
class Rule:
    """What an update rule takes and costs; its arithmetic has the same name in `modeling_looped.RULES`.

    Attributes:
        takes: the fields of `LoopSpec` that it needs or understands beside `steps` and `anchor`.
        damping: the default of that field; None means 1/K.
        evaluations_per_step: how often one of the K steps runs the span.
        summary: what it does, in a line.
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

    With x the hidden states that enter the span and g(h) one run through it, s the step size and beta the anchor, the
    default rule is

        n       = g(x)                           the natural pass
        h_1     = x + s * (n - x)
        h_{k+1} = h_k + s * (g(h_k) - h_k)       k = 1 .. K-1
        out     = beta * n + (1 - beta) * h_K

    and another one puts its own h_K in place, see `RULES`.

    Attributes:
        span: half-open range of decoder layers `(start, stop)`, counted from 0, or several that do not touch each
            other's layers, in order; each loops by itself.
        steps: K, how many times g is evaluated, the natural pass included (midpoint and heun take 2 evaluations a
            step, rk4 4); 1 is the base model.
        damping: the step size s, in (0, 1]; None means the rule's default, 1/K for euler. 1 is naive looping.
        anchor: beta, the weight of the natural pass in the output, in [0, 1]; 1 is the base model.
        mode: "block" loops the span as one function, "layer" loops each of its layers in turn.
        kv: which keys and values an iteration attends to. "shared": those of the natural pass, for every position;
            "per_step": its own, kept in further cache slots, as a physically unrolled model does; "reference": the
            natural ones of the past and its own of the current chunk, as the paper's authors do.
        decode: which decode steps loop (single-token forwards on a cache that is not empty; all else always loops).
            "full": all; "bypass": none; "first_n": the first `first_n` after the latest longer chunk.
        first_n: number of decode steps that loop under `decode="first_n"`.
        rule: how the iterates are updated, one of `RULES`.
        schedule: K step sizes in [0, 1] for rule ema_sched; K+1 weights that sum to 1 for poly_blend; else None.
        momentum: for rule heavy_ball, in [0, 1); None means 0.3.
        history: for rule anderson, how many past differences it fits, 1 or more; None means 2.
        frozen_routing: iterations use the experts, and their weights, that the natural pass chose (sparse MoE layers).
        norm_interpolation: every iterate but the last is rescaled, for each token and in fp32, to the norm
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


# Families whose greedy tokens vLLM was found to give as transformers does; the README has under which settings.
VLLM_FAMILIES = (
    "gemma2", "gemma3_text", "glm4_moe", "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
)  # fmt: skip


# Those of them whose experts vLLM computes itself, whatever activation the config names.
VLLM_EXPERTS = ("glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")

# Those of which torch.compile was found to compute loops wrongly there, where --enforce-eager gives the right tokens.
VLLM_EAGER = ("glm4_moe",)


def vllm_refusal(family: str, spec: LoopSpec, config: dict) -> str | None:
    """Why vLLM is not to serve a loop on a model, and what to do; None where it gives the tokens of transformers.

    Args:
        family: the base's model type.
        spec: the loop.
        config: the base's config, as config.json has it.
    """
    refusal = None if spec.is_identity else _vllm_loop_refusal(family, spec)
    return refusal or _vllm_model_refusal(family, config)


def _vllm_loop_refusal(family: str, spec: LoopSpec) -> str | None:
    if family not in VLLM_FAMILIES:
        return f"family {family} is none of those found exact there, {', '.join(VLLM_FAMILIES)}; use transformers"
    if spec.kv == "reference":
        return "kv reference depends on where chunks start, which vLLM chooses; set loop_kv to shared or per_step"
    if spec.kv == "per_step" and family == "gpt_oss":
        return "kv per_step was not made to work with attention sinks; set loop_kv to shared"
    if spec.decode != "full":
        return f"decode {spec.decode} depends on where a prompt ends, which vLLM does not tell; set loop_decode to full"
    if spec.frozen_routing:
        return (
            "vLLM chooses experts inside of its fused layer, where nothing can be frozen; set loop_frozen_routing to "
            "false"
        )
    return None


def _vllm_model_refusal(family: str, config: dict) -> str | None:
    """What vLLM computes by fields of the config, not by the family's code, where the two differ."""
    activation = config.get("hidden_act", "silu")
    if family in VLLM_EXPERTS and activation not in ("silu", "swish"):
        return f"vLLM computes experts with silu, whatever hidden_act says ({activation}); use transformers"
    if family == "mixtral" and config.get("num_experts_per_tok") == 1:
        return "vLLM weighs a single expert (num_experts_per_tok 1) where mixtral does not; use transformers"
    return None


def vllm_context(config: dict) -> int | None:
    """The longest context, in tokens, that vLLM serves as transformers does; None where there is no limit.

    Rotary embeddings of types longrope and dynamic follow the largest position of a forward, which at vLLM holds the
    tokens of many requests.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(parameters, dict):
        return None
    by_layer_type = [each for each in parameters.values() if isinstance(each, dict)]
    limits = [_rope_limit(each, config) for each in by_layer_type or [parameters]]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _rope_limit(parameters: dict, config: dict) -> int | None:
    """The number of positions up to which rotary frequencies stay as they are; None where they do at any."""
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    trained = config.get("max_position_embeddings")
    if rope_type in ("longrope", "su"):
        name = "original_max_position_embeddings"
        return parameters.get(name) or config.get(name) or trained
    return trained if "dynamic" in str(rope_type) else None


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


class LoopedConfigMixin:
    """Adds the loop to a native config class: fields are checked when set, and a saved config loads by itself."""

    def __setattr__(self, name, value):
        if name.startswith(FIELD_PREFIX):
            value = as_json(LoopSpec.check_field(name[len(FIELD_PREFIX) :], value))
        super().__setattr__(name, value)

    def to_dict(self):
        """The native dict, with an `auto_map` that never names another repository (a re-saved model stands alone)."""
        values = super().to_dict()
        if any(name.startswith(FIELD_PREFIX) for name in values):
            values["auto_map"] = auto_map(base_model_type(self.model_type))
        return values


def base_model_type(model_type: str) -> str:
    """The base's `model_type`: `looped_qwen3` -> `qwen3`."""
    return model_type[len(MODEL_TYPE_PREFIX) :]


def family_name(model_type: str) -> str:
    """A base `model_type` as it stands in class names: `qwen3_moe` -> `Qwen3Moe`."""
    return "".join(part[:1].upper() + part[1:] for part in model_type.replace("-", "_").split("_"))


def auto_map(model_type: str) -> dict[str, str]:
    """`auto_map` of a looped model whose base has `model_type`; class names are unknown to transformers on purpose."""
    name = CLASS_PREFIX + family_name(model_type)
    return {
        "AutoConfig": f"configuration_looped.{name}Config",
        "AutoModel": f"modeling_looped.{name}Model",
        "AutoModelForCausalLM": f"modeling_looped.{name}ForCausalLM",
    }


@lru_cache(maxsize=None)
def looped_config_class(family: str) -> type:
    """The config class of a family named as by `family_name`: the native one with the loop's fields.

    Raises:
        AttributeError: the installed transformers has no such family.
    """
    from transformers import CONFIG_MAPPING, __version__

    model_type = next((each for each in CONFIG_MAPPING if family_name(each) == family), None)
    if model_type is None:
        raise AttributeError(f"transformers {__version__} has no model family named {family}; install a newer one")
    name = f"{CLASS_PREFIX}{family}Config"
    native = CONFIG_MAPPING[model_type]
    body = {
        "model_type": MODEL_TYPE_PREFIX + model_type,
        "native_config_class": native,
        "__module__": __name__,
        "__qualname__": name,
    }
    config_class = type(name, (LoopedConfigMixin, native), body)
    _keep_tokenizer(model_type, native, config_class)
    return config_class


def _keep_tokenizer(model_type: str, native: type, config_class: type) -> None:
    """Let AutoTokenizer choose as it does for the base: where files leave it open, it goes by the model's type."""
    from transformers.models.auto import tokenization_auto as auto

    looped_type = MODEL_TYPE_PREFIX + model_type
    if model_type in auto.TOKENIZER_MAPPING_NAMES:
        auto.TOKENIZER_MAPPING_NAMES[looped_type] = auto.TOKENIZER_MAPPING_NAMES[model_type]
    if native in auto.TOKENIZER_MAPPING:
        auto.TOKENIZER_MAPPING.register(config_class, auto.TOKENIZER_MAPPING[native], exist_ok=True)
    distrusted: set = getattr(auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())  # transformers 5
    if model_type in distrusted:
        distrusted.add(looped_type)


def __getattr__(name: str) -> type:
    """Make `Looped<Family>Config` when it is first asked for, as `auto_map` and pickle do."""
    if not (name.startswith(CLASS_PREFIX) and name.endswith("Config")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return looped_config_class(name[len(CLASS_PREFIX) : -len("Config")])
