"""Configuration of a looped causal language model: the loop's fields, and one config class per base family.

Copied byte for byte into every exported directory, so it needs `transformers` and nothing else. All variation is in
`config.json`: the base's own fields, `model_type: looped_<base type>`, and the `loop_*` fields defined by `LoopSpec`.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

# Start of the sha256 of modeling_looped.py. transformers 5 tells local code apart by this file alone: without it, two
# exports of one directory name with different modeling code would share, in one process, whichever was loaded first.
MODELING_DIGEST = "902a2f7d98566682"

MODES = ("block", "layer")
KV_POLICIES = ("shared", "per_step", "reference")
DECODE_MODES = ("full", "bypass", "first_n")

FIELD_PREFIX = "loop_"
MODEL_TYPE_PREFIX = "looped_"
CLASS_PREFIX = "Looped"


@dataclass(frozen=True)
class LoopSpec:
    """What is looped, and how. The one definition of the loop's fields; a config stores each as `loop_<name>`.

    With x the hidden states that enter the span and g(h) one run through it, s the step size and beta the anchor:

        n       = g(x)                           the natural pass
        h_1     = x + s * (n - x)
        h_{k+1} = h_k + s * (g(h_k) - h_k)       k = 1 .. K-1
        out     = beta * n + (1 - beta) * h_K

    Attributes:
        span: half-open range of decoder layers `(start, stop)`, counted from 0.
        steps: K, how many times g is evaluated, the natural pass included; 1 is the base model.
        damping: the step size s, in (0, 1]; None means 1/K. 1 is naive looping.
        anchor: beta, the weight of the natural pass in the output, in [0, 1]; 1 is the base model.
        mode: "block" loops the span as one function, "layer" loops each of its layers in turn.
        kv: which keys and values an iteration attends to. "shared": those of the natural pass, for every position;
            "per_step": its own, kept in further cache slots, as a physically unrolled model does; "reference": the
            natural ones of the past and its own of the current chunk, as the paper's authors do.
        decode: which decode steps loop (single-token forwards on a cache that is not empty; all else always loops).
            "full": all; "bypass": none; "first_n": the first `first_n` after the latest longer chunk.
        first_n: number of decode steps that loop under `decode="first_n"`.

    Raises:
        ValueError: a field is out of range; the message says what is allowed.

    Source: paper section 3; K/V policies and decode modes from the authors' published code.
    """

    span: tuple[int, int]
    steps: int
    damping: float | None = None
    anchor: float = 0.0
    mode: str = "block"
    kv: str = "shared"
    decode: str = "full"
    first_n: int = 0

    def __post_init__(self):
        for name in FIELDS:
            object.__setattr__(self, name, self.check_field(name, getattr(self, name)))

    @property
    def width(self) -> int:
        """Number of layers in the span."""
        return self.span[1] - self.span[0]

    @property
    def step_size(self) -> float:
        """The Euler step s: `damping`, or 1/K where that is None, so that the integration time K*s is 1."""
        return 1.0 / self.steps if self.damping is None else self.damping

    @property
    def is_identity(self) -> bool:
        """Whether the looped model is the base model by definition (K = 1 or beta = 1)."""
        return self.steps == 1 or self.anchor == 1

    @property
    def extra_kv_slots(self) -> int:
        """Cache slots beyond one per layer: (K-1) * width under `per_step`, else none."""
        return 0 if self.kv != "per_step" or self.is_identity else (self.steps - 1) * self.width

    def check_depth(self, num_layers: int) -> None:
        """Raise ValueError unless the span lies inside a model of `num_layers` decoder layers."""
        if self.span[1] > num_layers:
            raise ValueError(
                f"span {self.span[0]}:{self.span[1]} ends outside the model, which has {num_layers} layers; "
                f"a span is half-open and may end at {num_layers} at most"
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
        values = {FIELD_PREFIX + name: getattr(self, name) for name in FIELDS}
        values[FIELD_PREFIX + "span"] = list(self.span)
        return values

    @staticmethod
    def check_field(name: str, value):
        """Return `value` of the field `name` in its canonical type.

        Raises:
            ValueError: the value is not allowed.
        """
        return _FIELD_CHECKS[name](value)


FIELDS = tuple(field.name for field in fields(LoopSpec))


def _check_span(value) -> tuple[int, int]:
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
    if not _is_int(value) or value < 1:
        raise ValueError(f"steps {value!r} must be a whole number of 1 or more (1 is the base model)")
    return value


def _check_damping(value) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"damping {value!r} must be a step size in (0, 1], or left out for 1/steps")
    return float(value)


def _check_anchor(value) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"anchor {value!r} must be a weight in [0, 1] (1 is the base model)")
    return float(value)


def _check_first_n(value) -> int:
    if not _is_int(value) or value < 0:
        raise ValueError(f"first_n {value!r} must be a whole number of 0 or more")
    return value


def _one_of(name: str, allowed: tuple[str, ...]):
    def check(value) -> str:
        if value not in allowed:
            raise ValueError(f"{name} {value!r} must be one of {', '.join(allowed)}")
        return value

    return check


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


_FIELD_CHECKS = {
    "span": _check_span,
    "steps": _check_steps,
    "damping": _check_damping,
    "anchor": _check_anchor,
    "mode": _one_of("mode", MODES),
    "kv": _one_of("kv", KV_POLICIES),
    "decode": _one_of("decode", DECODE_MODES),
    "first_n": _check_first_n,
}


class LoopedConfigMixin:
    """Adds the loop to a native config class: fields are checked when set, and a saved config loads by itself."""

    def __setattr__(self, name, value):
        if name.startswith(FIELD_PREFIX) and name[len(FIELD_PREFIX) :] in FIELDS:
            value = LoopSpec.check_field(name[len(FIELD_PREFIX) :], value)
            value = list(value) if isinstance(value, tuple) else value
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
