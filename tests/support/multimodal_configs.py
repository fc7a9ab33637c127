"""Tiny configs of multimodal families: the class's defaults, with every size in every nested config made small."""

from __future__ import annotations

import inspect
import warnings

from transformers import CONFIG_MAPPING, AutoConfig

from support.walk_configs import MLA, SPECIAL, TINY

VOCABULARY = 160
FIRST_SPECIAL_TOKEN = 100  # placeholders for images and the like; plain tokens are below
TEXT = TINY | {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
# Values of vision towers, audio towers and the parts between towers and text, where they have a field of the name.
TOWER = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "intermediate_size": 48, "mlp_dim": 48, "num_hidden_layers": 2,
    "depth": 2, "num_layers": 2, "encoder_layers": 2, "num_attention_heads": 2, "num_heads": 2, "attention_heads": 2,
    "encoder_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "image_size": 32, "patch_size": 8,
    "encoder_ffn_dim": 48, "projection_dim": 64, "output_dim": 64, "out_hidden_size": 64, "encoder_hidden_size": 32,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
TEXT_CONFIGS = ("text_config", "decoder")
INTERLEAVED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
# Further values of a config, nested or not, that it needs to exist at this size.
SPECIAL_PARTS: dict[str, dict] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 100, "num_query_tokens": 4, "image_text_hidden_size": 32},
    "instructblip": {"image_token_index": 100, "num_query_tokens": 4},
    "wavtokenizer_encoder": {"codebook_dim": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "moe_num_experts": 4,
        "moe_k": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_text": {"global_head_dim": 16},  # long heads make attention so sharp that rounding shows
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "glm4v_text": {"rope_scaling": MROPE},
    "glm4v_moe_text": {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "glm_ocr_text": {"rope_scaling": MROPE},
    "paddleocr_vl_text": {"rope_scaling": MROPE},
    "qwen2_5_vl_text": {"rope_scaling": MROPE},
    "qwen2_vl_text": {"rope_scaling": MROPE},
    "qwen2_5_omni_text": {"rope_scaling": MROPE},
    "qwen2_vl_vision": {"hidden_size": 64},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120, "vision_end_token_id": 121},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120, "vision_end_token_id": 121},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "phi4_multimodal_vision": {"crop_size": 32},
    "paligemma": {"projection_dim": 64},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "llama4_vision_model": {
        "intermediate_size": 128,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    "ovis2": {"hidden_size": 64, "vocab_size": VOCABULARY, "visual_indicator_token_ids": [121, 122, 123, 124, 125]},
    "ovis2_vision": {"vocab_size": 40},
    "kimi_k25": {"projection_hidden_size": 32},
    "gemma4_unified_vision": {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
    "inkling2_vision": {"text_hidden_size": 64},
    "hunyuan_vl_text": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "xdrope_section": [2, 2, 2, 2]},
    },
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "mllama_text_model": {
        "cross_attention_layers": [1, 4],
        "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3_vl_text": {"rope_scaling": INTERLEAVED},
    "qwen3_vl_moe_text": {"rope_scaling": INTERLEAVED},
    "mllama_vision_model": {
        "intermediate_layers_indices": [0],
        "num_global_layers": 1,
        "vision_output_dim": 64,
        "attention_heads": 2,
    },
    "granite4_vision": {
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        "deepstack_layer_map": [[0, 1], [1, 2]],
        "spatial_target_layers": [3],
        "downsample_rate": "2/4",
        "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
    },
    "muse_glimmer": {"vision_adapter_dim": 64},
    "step3p5": {"sliding_window": 8},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "voxtral": {"audio_token_id": 100},
    "voxtral_encoder": {"intermediate_size": 128, "encoder_ffn_dim": 128, "max_source_positions": 32},
    "voxtral_realtime": {"audio_token_id": 100},
    "glmasr_encoder": {"intermediate_size": 128},
    "qwen2_audio_encoder": {"max_source_positions": 32},
    "qwen3_asr_encoder": {"n_window": 16, "n_window_infer": 64, "downsample_hidden_size": 16},
    "qwen3_omni_moe_audio_encoder": {"n_window": 16, "n_window_infer": 64, "downsample_hidden_size": 16},
}
WRAPPERS = ("thinker_config", "vlm_config")


def tiny_multimodal_config(family: str):
    """A tiny config of a multimodal family, whose special tokens are from `FIRST_SPECIAL_TOKEN` up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = CONFIG_MAPPING[family]()
        return AutoConfig.for_model(family, **_tiny_values(default, "", _Tokens()))


class _Tokens(dict):
    """New token ids by name, so that equal names have equal ids in all nested configs."""

    def __missing__(self, name: str) -> int:
        self[name] = FIRST_SPECIAL_TOKEN + len(self)
        return self[name]


def _tiny_values(config, name: str, tokens: _Tokens) -> dict:
    """The fields to give to the class of a config, those of nested configs included."""
    nested = {key: _nested(config, key) for key in getattr(config, "sub_configs", {})}
    nested = {key: value for key, value in nested.items() if hasattr(value, "to_dict")}
    is_text = name in TEXT_CONFIGS or not (name or any(key in nested for key in (*TEXT_CONFIGS, *WRAPPERS)))
    values = _known(config, TEXT if is_text else TOWER) if is_text or name not in ("", *WRAPPERS) else {}
    if is_text:
        values |= _rope(config, values)
    values |= {key: tokens[key] for key in vars(config) if _is_placeholder(config, key)}
    special = SPECIAL.get(config.model_type, {}) | SPECIAL_PARTS.get(config.model_type, {})
    values |= special
    values |= {key: _tiny_values(value, key, tokens) | special.get(key, {}) for key, value in nested.items()}
    return ({"model_type": config.model_type} if name else {}) | values


def _nested(config, key: str):
    """A nested config; where the default has none, the default of its class."""
    given, known = vars(config).get(key), config.sub_configs[key]
    return known() if given is None and known is not AutoConfig else given


def _known(config, values: dict) -> dict:
    """The values that the class of a config has a field for."""
    fields = {
        *vars(config),
        *inspect.signature(type(config).__init__).parameters,
        *getattr(config, "attribute_map", {}),
    }
    if "kv_lora_rank" in fields and values is TEXT:
        values = values | MLA
    return {name: value for name, value in values.items() if name in fields}


def _is_placeholder(config, key: str) -> bool:
    value = vars(config)[key]
    is_text = key.startswith(("pad_", "bos_", "eos_"))
    return key.endswith(("token_id", "token_index")) and isinstance(value, int) and not is_text


def _rope(config, values: dict) -> dict:
    """The rotary embedding of a text config, with sections for the axes of an image that fit the tiny heads."""
    for key in ("rope_parameters", "rope_scaling"):
        given = getattr(config, key, None)
        if isinstance(given, dict) and "mrope_section" in given:
            half = int(values.get("head_dim", 16) * given.get("partial_rotary_factor", 1.0)) // 2
            return {key: given | {"mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]}}
    return {}
