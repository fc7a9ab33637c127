"""What the name of a tensor says: which layer owns it, and whether it is an embedding, a head or in a tower."""

from __future__ import annotations

import re

LAYER_TENSOR = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d{1,6})\.")

# Modules of multimodal models beside the language model: they read images, video or sound, or project what was read.
# Some have lists of layers of their own.
TOWER = re.compile(
    r"(^|\.)(\w*(vision|visual|image|video|audio|speech|acoustic|semantic_tokenizer|protein|perceiver|resampler|qformer"
    r"|projector|codec|vqmodel|sam_model|perception|talker|2wav)\w*|vit|connector|merger|aligner)\.|^encoder\.layers\."
)

# Tensors outside the layers, by module name: the token embeddings, which may also serve as the head, and heads.
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|w|((word|tok)_)?embeddings)\.\w*weight\w*$")
HEAD = re.compile(
    r"(^|\.)(((generator_)?lm_head|predictions)(\.decoder)?|embed_out|output(_projection)?)\.\w*weight\w*$"
    r"|^decoder\.\w*weight\w*$"
)

# Parts of names that wrappers around a module add, and what removes them. No native model has such names.
WRAPPERS = {
    r"base_model\.": "save the merged model again (PEFT: `merge_and_unload()`, then `save_pretrained`)",
    r".*\.(base_layer|lora_[AB])\.": "save the merged model again (PEFT: `merge_and_unload()`, then `save_pretrained`)",
    r"module\.": "save the model inside the wrapper (`model.module.save_pretrained`)",
    r"(.*\.)?_orig_mod\.": "save the model that was not compiled (`model._orig_mod.save_pretrained`)",
    r"(.*\.)?(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": "save the full state dict without the wrappers",
}


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that owns a tensor; None for a tensor outside the language model's layers."""
    match = LAYER_TENSOR.search(name)
    return int(match[1]) if match and not TOWER.search(name[: match.start(1)]) else None


def is_tower(name: str) -> bool:
    """Whether a tensor is of a multimodal model, but outside its language model."""
    return layer_of(name) is None and TOWER.search(name) is not None


def layers_path(name: str) -> str | None:
    """The path of the decoder's layer list that a tensor is in, such as `model.layers`; None for other tensors."""
    match = LAYER_TENSOR.search(name)
    return name[: match.start(1) - 1] if match and layer_of(name) is not None else None


def wrapper_of(name: str) -> tuple[str, str] | None:
    """The start of a name as far as a wrapper added it, and what removes it; None for a name of a native model."""
    for pattern, remedy in WRAPPERS.items():
        match = re.match(pattern, name)
        if match:
            return match[0], remedy
    return None
