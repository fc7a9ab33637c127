"""Tiny random multimodal models and prompts with pictures, one for each way that a picture reaches the layers."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

from .tiny import MIXED_LAYERS, NUM_LAYERS, SLIDING_WINDOW, VOCAB, tiny_tokens

# Ids that the prompts have nowhere else.
VIDEO_TOKEN, VISION_START, VISION_END, IMAGE_TOKEN = range(VOCAB - 4, VOCAB)

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # as for the text models: a wrong loop has to show
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# As many layers as the language model has: a search for the decoder layers must not find the vision tower.
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "num_hidden_layers": NUM_LAYERS, "vision_use_head": False}
PIXTRAL = {**VISION, "model_type": "pixtral", "num_hidden_layers": NUM_LAYERS}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": NUM_LAYERS, "num_heads": 2, "out_hidden_size": 64}
QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

KINDS: dict[str, dict] = {
    # Image tokens see each other in both directions; every second layer has a sliding window.
    "gemma3": {
        "text_config": {
            **TEXT,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": MIXED_LAYERS,
            "query_pre_attn_scalar": 16,
        },
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
    },
    # Positions have three coordinates.
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_scaling": MROPE, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "patch_size": 4, "fullatt_block_indexes": [1]},
        **QWEN_IDS,
    },
    # Image features are also added to the outputs of the first two decoder layers.
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_scaling": MROPE, "rope_parameters": MROPE},
        "vision_config": {
            **QWEN_VISION,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1, 3],
        },
        **QWEN_IDS,
    },
    # Image features replace the embeddings, nothing else.
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": PIXTRAL,
        "image_token_index": IMAGE_TOKEN,
        "spatial_merge_size": 1,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": NUM_LAYERS},
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 16,
    },
    # Linear attention beside full attention; newer than the oldest transformers that we support.
    "qwen3_5": {
        "text_config": {
            **TEXT,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * (NUM_LAYERS // 3),
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
        },
        "vision_config": {**QWEN_VISION, "patch_size": 4, "num_position_embeddings": 16},
        **QWEN_IDS,
    },
}

# Image tokens of one picture.
IMAGE_TOKENS = {"gemma3": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "mistral3": 16, "llava": 16, "qwen3_5": 4}


def multimodal_config(kind: str, **text_overrides):
    """The tiny config of a kind; keywords replace fields of the text config."""
    settings = KINDS[kind]
    return AutoConfig.for_model(kind, **{**settings, "text_config": {**settings["text_config"], **text_overrides}})


def multimodal_model(kind: str, seed: int = 0, **text_overrides):
    """A tiny random multimodal model, in fp32 and eval mode; it never generates the token of an image."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(multimodal_config(kind, **text_overrides))
    for name, parameter in model.named_parameters():  # norms start as constants, which would hide mistakes
        if "norm" in name or name.endswith("mm_input_projection_weight"):  # and Gemma 3's projection of images as zeros
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight[VIDEO_TOKEN:] = 0
    return model.eval()


def image_prompt(kind: str, batch: int = 1, pictures: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    """Model inputs of a prompt with pictures: text, each picture followed by text, one row per prompt.

    Args:
        kind: a key of `KINDS`.
        batch: number of rows, each with other text and other pictures.
        pictures: number of pictures in each row.
        seed: seed of the text and the pictures.

    Returns:
        `input_ids`, `attention_mask` and what the kind wants beside them, such as `pixel_values`.
    """
    text = tiny_tokens(batch, 4 * (pictures + 1), seed).clamp(max=VIDEO_TOKEN - 1)
    parts = [text[:, :4]]
    for number in range(1, pictures + 1):
        parts += [_picture_ids(kind, batch), text[:, 4 * number : 4 * number + 4]]
    ids = torch.cat(parts, dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | _of_tokens(kind, ids) | _pixels(kind, batch * pictures, seed)


def tiny_multimodal(kind: str, seed: int = 0, **text_overrides) -> tuple:
    """A tiny model, the ids of a prompt with one picture, and what else a forward takes for that picture."""
    inputs = image_prompt(kind)
    ids = inputs.pop("input_ids")
    return multimodal_model(kind, seed, **text_overrides), ids, inputs


def save_multimodal(kind: str, directory: Path, **text_overrides) -> Path:
    """Save a tiny multimodal base."""
    multimodal_model(kind, **text_overrides).save_pretrained(directory)
    return directory


def for_longer(kind: str, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs for a sequence of other length with the same pictures, for a forward without a cache."""
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), **_of_tokens(kind, ids)}


def _picture_ids(kind: str, batch: int) -> torch.Tensor:
    ids = [IMAGE_TOKEN] * IMAGE_TOKENS[kind]
    return torch.tensor([[VISION_START, *ids, VISION_END]] * batch)


def _of_tokens(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs with one entry for each token."""
    arguments = inspect.signature(_model_class(kind).forward).parameters  # earlier Qwens look at the ids themselves
    names = [name for name in ("token_type_ids", "mm_token_type_ids") if name in arguments]
    return {name: (ids == IMAGE_TOKEN).long() for name in names}


def _model_class(kind: str) -> type:
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[kind]]


def _pixels(kind: str, pictures: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("qwen"):  # 4 x 4 patches of 2 frames, 3 colours and 4 x 4 pixels, merged 2 x 2
        return {
            "pixel_values": torch.randn(16 * pictures, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * pictures),
        }
    pixels = {"pixel_values": torch.randn(pictures, 3, 28, 28, generator=generator)}
    return pixels | ({"image_sizes": torch.tensor([[28, 28]] * pictures)} if kind == "mistral3" else {})


def save_processor(kind: str, directory: Path) -> Path:
    """Save the processor of "gemma3" or "llava", with a tokenizer of one token for each word; needs Pillow.

    transformers makes the other processors only where torchvision is installed.
    """
    from transformers import Gemma3Processor, LlavaProcessor
    from transformers.models.clip import CLIPImageProcessorPil
    from transformers.models.gemma3 import Gemma3ImageProcessorPil

    side = {"height": 28, "width": 28}
    if kind == "gemma3":
        tokenizer = _tokenizer(boi_token="<start>", eoi_token="<end>", image_token="<image>")
        processor = Gemma3Processor(Gemma3ImageProcessorPil(size=side), tokenizer, image_seq_length=4)
    else:
        processor = LlavaProcessor(
            CLIPImageProcessorPil(size=side, crop_size=side),
            _tokenizer(image_token="<image>"),
            patch_size=7,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    processor.save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path) -> Path:
    """Save a tokenizer of one token for each word."""
    _tokenizer().save_pretrained(directory)
    return directory


def _tokenizer(**special: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*named, *(f"word{n}" for n in range(VIDEO_TOKEN - len(named))), "<video>", "<start>", "<end>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )
