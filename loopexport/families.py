"""Which models can be looped, told from `config.json` alone.

The modeling template works on any native decoder that iterates one list of layers; a family is listed here once the
test matrix has proved it.
"""

from __future__ import annotations

from .errors import CheckpointError
from .templates.configuration_looped import MODEL_TYPE_PREFIX

# What the number of decoder layers is called; the first that a config has counts.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_family(config: dict) -> None:
    """Check that a config describes a decoder-only causal language model of a tested family.

    Raises:
        CheckpointError: it does not; the message says what it is and what can be done.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError("config.json names no model_type; is it a Hugging Face model directory?")
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(
            f"the model is looped already ({model_type}); change its loop_* config fields, or `loopexport restore` it"
        )
    architectures = config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{_names(architectures, model_type)} is an encoder-decoder; only decoders can be looped")
    if isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is multimodal; loop its language model: load that with "
            "AutoModelForCausalLM, `save_pretrained` it, and convert the result"
        )
    if not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is not a causal language model "
            "(architectures: ...ForCausalLM or ...LMHeadModel)"
        )
    if not layer_count(config):
        raise CheckpointError(
            f"config.json tells no number of layers ({', '.join(LAYER_COUNT_KEYS)}), so there are none to loop"
        )


def layer_count(config: dict) -> int | None:
    """L, the number of decoder layers, or None where the config does not tell."""
    return next((config[key] for key in LAYER_COUNT_KEYS if config.get(key) is not None), None)


def _names(architectures, model_type: str) -> str:
    return ", ".join(map(str, architectures)) if architectures else model_type
