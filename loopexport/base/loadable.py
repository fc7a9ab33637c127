"""Refuse checkpoints that transformers itself cannot load right: it would fill in random weights, with a warning.

The checks use the config and the tensor names alone, and pass what they do not understand.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from loopexport.errors import CheckpointError

from .families import is_language_model, is_multimodal, layer_count, newest_outcome, text_config, ties_by_default
from .tensor_names import HEAD, is_tower, layer_of, layers_path, wrapper_of

# Outcomes of families that were tried: which names they read is known.
TRIED = ("works", "in part", "no span")

# Embeddings and heads in the words of any family.
SOME_EMBEDDING = re.compile(r"emb|wte|^(.*\.)?w\.")
SOME_HEAD = re.compile(rf"{HEAD.pattern}|head|lm_loss|pred_layer|unembed")

# How multimodal checkpoints name their language model, and the text families that read such names too, on transformers
# 4.57 or 5.24.
MULTIMODAL = {
    "language_model.": ("gemma3_text", "llama4_text"),
    "model.language_model.": ("apertus1p5_text", "gemma3n_text", "qwen3_5_text", "qwen3_5_moe_text"),
}

# Multimodal families that have their layers where text families have them.
WITHOUT_LANGUAGE_MODEL = (
    "cosmos3_edge", "cosmos3_omni", "dots3_note", "ernie4_5_vl_moe", "evolla", "hy_v4_vl", "idefics",
    "kyutai_speech_to_text", "mistral_large4", "molmo2", "paddleocr_vl", "phi4_multimodal", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker", "step3p7", "unlimited_ocr",
)  # fmt: skip

# Multimodal families whose config takes `tie_word_embeddings` of the `text_config` if its own is false.
TIED_BY_TEXT = ("fast_vlm", "llava", "llava_next_video", "llava_onevision", "minimax_m3_vl", "video_llama_3")

# Where the layers are; in all other families that were tried, at `model.layers`.
LAYERS = {
    "transformer.h": (
        "bloom", "codegen", "ctrl", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"
    ),
    "transformer.blocks": ("mpt",),
    "model.decoder.layers": ("opt",),
    "backbone.layers": ("falcon_mamba", "mamba", "mamba2"),
    "rwkv.blocks": ("rwkv",),
    "roberta.encoder.layer": ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    "bert.encoder.layer": ("bert", "big_bird", "megatron-bert"),
    **{f"{name}.layers": (name,) for name in ("biogpt", "gpt_neox", "gpt_neox_japanese")},
    **{
        f"{name.replace('-', '_')}.encoder.layer": (name,)
        for name in ("data2vec-text", "electra", "ernie", "rembert", "roberta-prelayernorm", "roc_bert", "roformer")
    },
}  # fmt: skip
ORDINARY_LAYERS = "model.layers"
# Names that transformers 5.24 renames when it loads a checkpoint of the family.
RENAMED_LAYERS = {
    "exaone": "transformer.h",
    "inkling2_loop_text": "model.llm.layers",
    "inkling2_text": "model.llm.layers",
    "nemotron_h": "backbone.layers",
}

SOME_NORM = re.compile(r"norm|(^|\.)ln(_|\.)", re.IGNORECASE)
# Families whose norms outside the layers have no weights.
NORMS_WITHOUT_WEIGHTS = ("nanochat", "olmo")

AGAIN = "download or save the checkpoint again"


def check_loadable(config: dict, names: Collection[str]) -> None:
    """Check that the tensors, by `names`, are all that the config asks for.

    Raises:
        CheckpointError: the names have the prefix of a wrapper, or tensors are missing; the message says which.
    """
    _check_no_wrapper(names)
    was_tried = newest_outcome(config["model_type"])[0] in TRIED
    if was_tried and is_multimodal(config):
        _check_multimodal_names(config, names)
    elif was_tried:
        _check_not_multimodal(config["model_type"], names)
        _check_own_names(config["model_type"], names)
    if was_tried:
        _check_layers(layer_count(config) or 0, names)
    outside = [name for name in names if layer_of(name) is None and not is_tower(name)]
    has_head = any(SOME_HEAD.search(name) for name in outside)
    has_embedding = any(SOME_EMBEDDING.search(name) for name in outside)
    if not has_embedding and not (has_head and is_tied(config)):
        raise CheckpointError(f"the weights have no token embeddings, and transformers would make random ones; {AGAIN}")
    if not has_head and not is_tied(config):
        raise CheckpointError(_no_head(config))
    if was_tried:
        _check_norm(config["model_type"], outside)


def check_index(index: dict, name: str) -> None:
    """Check what transformers needs of a weights index besides its `weight_map`.

    Raises:
        CheckpointError: there is no `metadata`.
    """
    if not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f'{name} has no metadata, and transformers cannot load it; add "metadata": {{}} to it')


def _check_no_wrapper(names: Collection[str]) -> None:
    for name in names:
        wrapper = wrapper_of(name)
        if wrapper:
            raise CheckpointError(
                f"the weights have names such as {name}, and transformers would ignore them because of "
                f"{wrapper[0]!r}; {wrapper[1]}"
            )


def _check_not_multimodal(model_type: str, names: Collection[str]) -> None:
    for prefix, families in MULTIMODAL.items():
        found = next((name for name in names if name.startswith(prefix)), None)
        if found and model_type not in families:
            raise CheckpointError(
                f"the weights have names such as {found}, of a multimodal model, but the config is of {model_type}; "
                "convert the multimodal checkpoint itself, with its own config.json"
            )


def _check_multimodal_names(config: dict, names: Collection[str]) -> None:
    """Check that the names are of a multimodal model, by one older or newer than the installed transformers."""
    model_type = config["model_type"]
    found = next((name for name in names if layer_of(name) is not None), None)
    if found is None:
        raise CheckpointError(f"the weights have no layers, and transformers would make random ones; {AGAIN}")
    has_own = any(layers_path(name) not in (None, ORDINARY_LAYERS, "layers") for name in names)
    if not has_own and model_type not in WITHOUT_LANGUAGE_MODEL:
        raise CheckpointError(
            f"the weights have names such as {found}, of a language model alone, but {model_type} is multimodal, and "
            "transformers would make random ones; correct model_type in config.json, or rename the tensors"
        )
    if isinstance(config.get("vision_config"), dict) and not any(map(is_tower, names)):
        raise CheckpointError(
            f"config.json has a vision_config, but the weights have no vision tower, and transformers would make a "
            f"random one; {AGAIN}"
        )


def check_text_names(text_type: str, names: Collection[str]) -> None:
    """Check that a text family reads the layers of a language model that is taken out of a multimodal one.

    Raises:
        CheckpointError: it has its layers elsewhere.
    """
    found = _unread_layers(text_type, names) if newest_outcome(text_type)[0] in TRIED else {}
    if found:
        raise CheckpointError(
            f"the language model has names such as {min(found.values())}, which its text family does not read: "
            f"{text_type} has its layers at {_own_path(text_type)}; leave --text-only out"
        )


def _check_own_names(model_type: str, names: Collection[str]) -> None:
    """Check that the layers are where the family has them, with or without the name of the model around them."""
    if not any(layers_path(name) for name in names):
        raise CheckpointError(f"the weights have no layers, and transformers would make random ones; {AGAIN}")
    found = _unread_layers(model_type, names)
    if found:
        raise CheckpointError(
            f"the weights have names such as {min(found.values())}, but {model_type} has its layers at "
            f"{_own_path(model_type)}, and transformers would make random ones; correct model_type in config.json, or "
            "rename the tensors"
        )


def _unread_layers(model_type: str, names: Collection[str]) -> dict[str, str]:
    """A tensor of each list of layers by the list's path, if the family has its layers at none of them; else empty."""
    own = _own_path(model_type)
    found = {path: name for name in names if (path := layers_path(name)) is not None}
    reads_more = any(model_type in families for families in MULTIMODAL.values())
    readable = {own, own.partition(".")[2], RENAMED_LAYERS.get(model_type)}
    return {} if reads_more or not readable.isdisjoint(found) else found


def _own_path(model_type: str) -> str:
    return next((path for path, families in LAYERS.items() if model_type in families), ORDINARY_LAYERS)


def _check_norm(model_type: str, outside: Collection[str]) -> None:
    if model_type not in NORMS_WITHOUT_WEIGHTS and not any(SOME_NORM.search(name) for name in outside):
        raise CheckpointError(f"the weights have no final norm, and transformers would make a new one; {AGAIN}")


def _check_layers(count: int, names: Collection[str]) -> None:
    owners = {layer_of(name) for name in names} - {None}
    missing = [layer for layer in range(count) if layer not in owners]
    if missing and owners:
        raise CheckpointError(
            f"config.json says {count} layers, but the weights have none for layer {missing[0]}, and transformers "
            f"would make random ones; correct the number of layers, or {AGAIN}"
        )


def is_tied(config: dict) -> bool:
    """Whether the token embeddings serve as the head; the top config of a multimodal model comes before its text's."""
    values = [each.get("tie_word_embeddings") for each in (config, text_config(config))]
    given = [value for value in values if value is not None]
    if not given:  # the family decides; most bases that leave it out are tied
        return is_language_model(config) or ties_by_default(config["model_type"])
    tied = any(given) if config["model_type"] in TIED_BY_TEXT else given[0]
    return bool(tied) or "shared_input_output_embedding" in config  # the second is open-llama's own key


def _no_head(config: dict) -> str:
    names = ", ".join(config.get("architectures") or ["no class"])
    return (
        f"the weights have no head (lm_head), the config does not tie it to the embeddings, and transformers would "
        f"make a random one (architectures: {names}); convert a checkpoint with a head, or set tie_word_embeddings if "
        "it is tied"
    )
