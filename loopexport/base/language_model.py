"""The language model alone of a multimodal checkpoint, for `--text-only`: its config and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

from loopexport.errors import CheckpointError

from .families import TOWER_CONFIGS, is_multimodal, layer_count, text_config
from .tensor_names import is_tower

DTYPES = ("dtype", "torch_dtype")  # the whole model loads in that of its top config, whatever its text_config says
# Fields that a multimodal config may have on top for its language model.
SHARED_FIELDS = (*DTYPES, "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")

# Fields of the text family that the class of the whole model does not apply to its logits, and the values with which
# the text family does not apply them either.
NOT_APPLIED: dict[str, dict] = {
    "aya_vision": {"logit_scale": 1.0},
    "cohere2_vision": {"logit_scale": 1.0},
    "gemma3": {"final_logit_softcapping": None},
}

# Gemma's text tokens attend to later ones; in the whole model, which ones depends on the inputs beside the tokens.
BIDIRECTIONAL = (True, "all")

# How multimodal checkpoints name the tensors of their language model, and how the text family names them.
RENAMED = (
    (re.compile(r"^(model\.)?language_model\.(?=(model|transformer|backbone|lm_head)\.)"), ""),
    (re.compile(r"^model\.(language_model|text_model)\.(?=lm_head\.)"), ""),
    (re.compile(r"^model\.(language_model|text_model)\."), "model."),
    (re.compile(r"^text_model\.(?=(model|lm_head)\.)"), ""),
    (re.compile(r"^llm\.(?=(model|lm_head)\.)"), ""),
)
HEAD_ON_TOP = re.compile(r"lm_head\.")
TEXT_NAME = re.compile(r"(model|lm_head)\.")

# Text families that read the names of the multimodal checkpoint as they are, on every transformers that has them.
READ_AS_NAMED = {
    "llama4_text": "language_model.",
    "apertus1p5_text": "model.language_model.",
    "qwen3_5_text": "model.language_model.",
    "qwen3_5_moe_text": "model.language_model.",
}

# Multimodal families whose tensors the text family does not read: the checkpoint names or splits them otherwise.
UNREADABLE = ("inkling_mm_model", "minimax_m3_vl", "nemo_speechlm")


def language_model_config(config: dict) -> dict:
    """The config of the language model alone: its `text_config`, and what the top config has for it.

    Raises:
        CheckpointError: the model is not multimodal, or transformers cannot run its language model alone.
    """
    model_type = config.get("model_type")
    if not is_multimodal(config):
        raise CheckpointError(_nothing_to_take_out(config))
    if config.get("quantization_config") or text_config(config).get("quantization_config"):
        raise CheckpointError(
            f"{model_type} is quantised, and its quantization_config is for the whole model; leave --text-only out, or "
            "convert the checkpoint that was not quantised"
        )
    if text_config(config).get("use_bidirectional_attention") in BIDIRECTIONAL:
        raise CheckpointError(
            f"{model_type} has use_bidirectional_attention, with which its language model alone attends to other "
            "tokens than in the whole; leave --text-only out"
        )
    text_type = _text_type(config)
    if text_type == model_type:
        raise CheckpointError(_nothing_to_take_out(config))
    return {
        **_fields(config),
        **NOT_APPLIED.get(str(model_type), {}),
        "model_type": text_type,
        "architectures": [_causal_class(str(model_type), text_type)],
        "num_hidden_layers": layer_count(config),
    }


def native_names(text_type: str, names: Collection[str]) -> dict[str, str]:
    """The name in the text family of each tensor of the language model; tensors of other parts are not in it."""
    found = {name: renamed for name in names if (renamed := _renamed(name)) is not None and not is_tower(name)}
    if not found:  # its names are those of the text family
        return {name: name for name in names if TEXT_NAME.match(name) and not is_tower(name)}
    found |= {name: name for name in names if HEAD_ON_TOP.match(name)}
    as_named = READ_AS_NAMED.get(text_type)
    is_read = as_named is not None and all(name.startswith((as_named, "lm_head.")) for name in found)
    return {name: name if is_read else renamed for name, renamed in found.items()}


def _fields(config: dict) -> dict:
    """The fields of the `text_config`, and those of the top config that it does not have or has as null."""
    shared = {name: config[name] for name in SHARED_FIELDS if config.get(name) is not None}
    others = ("text_config", *TOWER_CONFIGS, *DTYPES)
    own = {name: value for name, value in text_config(config).items() if name not in others}
    return shared | {name: value for name, value in own.items() if value is not None or name not in shared}


def _nothing_to_take_out(config: dict) -> str:
    has_tower = any(isinstance(config.get(key), dict) for key in TOWER_CONFIGS)
    what = "has no text_config to take out" if has_tower else "is a language model already"
    return f"{config.get('model_type')} {what}; leave --text-only out"


def _renamed(name: str) -> str | None:
    """The name in the text family of a tensor that is named after the language model; None for others."""
    return next((pattern.sub(new, name) for pattern, new in RENAMED if pattern.match(name)), None)


def _text_type(config: dict) -> str:
    given = text_config(config).get("model_type")
    if text_config(config) is not config and isinstance(given, str):
        return given
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"text_config has no model_type, and transformers has no family {model_type!r} to ask")
    return CONFIG_MAPPING[model_type]().get_text_config(decoder=True).model_type


def _causal_class(model_type: str, text_type: str) -> str:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if text_type not in NAMES or model_type in UNREADABLE:
        raise CheckpointError(
            f"the language model of {model_type} is a {text_type}, for which transformers {__version__} has no causal "
            "language model that reads its tensors; leave --text-only out"
        )
    return NAMES[text_type]
