"""Configuration of a looped causal language model: one config class per base family, with the loop's fields.

Copied byte for byte into every exported directory, so it needs `transformers` and nothing else. All variation is in
`config.json`: the base's own fields, `model_type: looped_<base type>`, and the `loop_*` fields defined by `LoopSpec`.
"""

from __future__ import annotations

import sys
from functools import lru_cache

_DIGEST_BEFORE = globals().get("CODE_DIGEST")  # None unless this file is run again in the module that it has made

# Start of the sha256 of all other files that are copied along. transformers 5 tells local code apart by this file
# alone: without it, two exports of one directory name with different code would share, in one process, whichever was
# loaded first.
CODE_DIGEST = "620e065324e8812d"

if _DIGEST_BEFORE not in (None, CODE_DIGEST):
    # transformers 4 copies the code of exports of one directory name to one place, and runs a changed file again, but
    # not the files that it imports: forget those of the other version.
    for _name in [each for each in sys.modules if each.startswith(f"{__name__.rpartition('.')[0]}.looped_")]:
        del sys.modules[_name]

from .looped_spec import FIELD_PREFIX, LoopSpec, as_json  # noqa: E402

MODEL_TYPE_PREFIX = "looped_"
CLASS_PREFIX = "Looped"


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
