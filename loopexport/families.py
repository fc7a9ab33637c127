"""Which models can be looped, told from `config.json` alone.

The modeling template works on any native decoder that iterates one list of layers; a family is listed here once the
test matrix has proved it.
"""

from __future__ import annotations

from .errors import CheckpointError
from .templates.configuration_looped import MODEL_TYPE_PREFIX

# `model_type` of every family that the tests hold to the oracle.
TESTED_FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")


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
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is not a causal language model (architectures: ...ForCausalLM)"
        )
    if model_type not in TESTED_FAMILIES:
        raise CheckpointError(
            f"family {model_type!r} is not among those tested: {', '.join(TESTED_FAMILIES)}; please open an issue"
        )
    if not config.get("num_hidden_layers"):
        raise CheckpointError("config.json has no num_hidden_layers, so there are no layers to loop")


def _names(architectures, model_type: str) -> str:
    return ", ".join(map(str, architectures)) if architectures else model_type
