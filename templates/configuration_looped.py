"""The config of a looped language model: one class per base family, the native class plus the loop fields.

Every export has a copy of this file. It needs only transformers. Exports differ only in `config.json`, which has the
base's own fields, `model_type: looped_<base type>`, and the `loop_*` fields that `LoopSpec` defines. They are on top,
also where the fields of the language model are in `text_config`.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from importlib import import_module

_DIGEST_BEFORE = globals().get("CODE_DIGEST")  # not None if transformers runs this file again in the same module

# Start of the sha256 of all other copied files. transformers 5 caches local code by directory name and the content of
# this file: without the digest, two exports with one directory name but different code would, in one process, both run
# the code that was loaded first.
CODE_DIGEST = "dca95f5a44c9839b"

if _DIGEST_BEFORE not in (None, CODE_DIGEST):
    # transformers 4 copies the code of all exports with one directory name to one place. It runs a changed file again,
    # but not the files that this one imports, so remove the modules of the other version.
    for _name in [each for each in sys.modules if each.startswith(f"{__name__.rpartition('.')[0]}.looped_")]:
        del sys.modules[_name]

from .looped_fields import MAX_COUNT  # noqa: E402, F401  transformers 4 copies only files that this one imports
from .looped_path import layers_of  # noqa: E402, F401  as above
from .looped_spec import FIELD_PREFIX, LoopSpec, as_json  # noqa: E402

MODEL_TYPE_PREFIX = "looped_"
CLASS_PREFIX = "Looped"

# The ends of the names of model classes, by Auto class. A family may lack some of them in transformers, and then here.
HEADS = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}
# The same for models that read images, video or sound too; transformers 4 lacks the second Auto class.
MULTIMODAL_HEADS = {
    "AutoModelForImageTextToText": "ForConditionalGeneration",
    "AutoModelForMultimodalLM": "ForConditionalGeneration",
}

# The tables in which transformers looks up a processor if its files name no class: module and name.
PROCESSOR_TABLES = {
    "processing_auto": "PROCESSOR_MAPPING",
    "image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "video_processing_auto": "VIDEO_PROCESSOR_MAPPING",
    "feature_extraction_auto": "FEATURE_EXTRACTOR_MAPPING",
}

# Tables of other libraries that have an entry for each model type: their module, and the start of their names.
TYPE_TABLES = {
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_",
    "peft.tuners.adaption_prompt.config": "TRANSFORMERS_MODEL_CONFIG",
    "liger_kernel.transformers.monkey_patch": "MODEL_TYPE_TO_APPLY_LIGER_FN",
}


class LoopedConfigMixin:
    """Adds the loop to a native config class: checks loop fields when they are set, and saves a complete `auto_map`.

    Attributes:
        native_config_class: the native config class.
        loop_path: the only loop field that `config.json` may lack.
    """

    native_config_class: type
    loop_path = None  # or else `from_pretrained(..., loop_path=...)` would hand it to the model

    def __setattr__(self, name, value):
        if name.startswith(FIELD_PREFIX):
            value = as_json(LoopSpec.check_field(name[len(FIELD_PREFIX) :], value))
        super().__setattr__(name, value)

    def to_dict(self):
        """The native dict with our `auto_map`, which never names another repository, so a saved copy is complete."""
        values = super().to_dict()
        if any(name.startswith(FIELD_PREFIX) for name in values):
            values["auto_map"] = auto_map(base_model_type(self.model_type), is_multimodal(self.native_config_class))
        _list_as_native(self.model_type)  # libraries read a config before they look up its type
        return values


def base_model_type(model_type: str) -> str:
    """The base's `model_type`, such as `qwen3` for `looped_qwen3`."""
    return model_type[len(MODEL_TYPE_PREFIX) :]


def family_name(model_type: str) -> str:
    """The spelling of a base `model_type` in class names, such as `Qwen3Moe` for `qwen3_moe`."""
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[-_.]", model_type))


def auto_map(model_type: str, is_multimodal: bool = False) -> dict[str, str]:
    """The `auto_map` for a base `model_type`; transformers has no classes of these names, so it must load ours."""
    name = CLASS_PREFIX + family_name(model_type)
    heads = {**HEADS, **(MULTIMODAL_HEADS if is_multimodal else {})}
    models = {auto: f"modeling_looped.{name}{head}" for auto, head in heads.items()}
    return {"AutoConfig": f"configuration_looped.{name}Config", **models}


def is_multimodal(native: type) -> bool:
    """Whether models of a native config class read images, video or sound too."""
    return any(native in mapping for mapping in multimodal_mappings())


def multimodal_mappings() -> list:
    """The mappings of transformers from config classes to such models; none without torch, as beside mlx-lm."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.utils import is_torch_available

    if not is_torch_available():
        return []
    names = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")
    return [getattr(auto, name) for name in names if hasattr(auto, name)]


@lru_cache(maxsize=None)
def looped_config_class(family: str) -> type:
    """The looped config class of a family, named as `family_name` spells it: the native class plus the loop fields.

    Raises:
        AttributeError: the installed transformers has no such family; install a newer one.
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
    _keep_processors(native, config_class)
    _list_as_native(MODEL_TYPE_PREFIX + model_type)
    return config_class


def _list_as_native(model_type: str) -> None:
    """Give the looped type the entry of the base's type in the tables of other libraries, if they are imported."""
    for module, prefix in TYPE_TABLES.items():
        for name, table in list(vars(sys.modules.get(module, sys)).items()):
            if name.startswith(prefix) and isinstance(table, dict) and base_model_type(model_type) in table:
                table.setdefault(model_type, table[base_model_type(model_type)])


def _keep_tokenizer(model_type: str, native: type, config_class: type) -> None:
    """Let AutoTokenizer choose as for the base: without a class in the files, it looks up the model type."""
    from transformers.models.auto import tokenization_auto as auto

    looped_type = MODEL_TYPE_PREFIX + model_type
    if model_type in auto.TOKENIZER_MAPPING_NAMES:
        auto.TOKENIZER_MAPPING_NAMES[looped_type] = auto.TOKENIZER_MAPPING_NAMES[model_type]
    if native in auto.TOKENIZER_MAPPING:
        auto.TOKENIZER_MAPPING.register(config_class, auto.TOKENIZER_MAPPING[native], exist_ok=True)
    distrusted: set = getattr(auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())  # transformers 5
    if model_type in distrusted:
        distrusted.add(looped_type)


def _keep_processors(native: type, config_class: type) -> None:
    """Let AutoProcessor and its parts choose as for the base, in the same way."""
    for module, name in PROCESSOR_TABLES.items():
        table = getattr(import_module(f"transformers.models.auto.{module}"), name)
        if native in table:
            table.register(config_class, table[native], exist_ok=True)


def __getattr__(name: str) -> type:
    """Make `Looped<Family>Config` when `auto_map` or pickle first looks it up."""
    if not (name.startswith(CLASS_PREFIX) and name.endswith("Config")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return looped_config_class(name[len(CLASS_PREFIX) : -len("Config")])
