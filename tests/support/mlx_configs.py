"""Configs of transformers 5, with what mlx-lm reads under other names, and those that it cannot express."""

from __future__ import annotations

FULL, SLIDING = "full_attention", "sliding_attention"
THIRD, IRREGULAR = [SLIDING, SLIDING, FULL] * 2, [SLIDING, FULL, FULL, SLIDING, SLIDING, FULL]
WITHOUT_SLIDING = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
WINDOW = {"sliding_window": 8}


def rope(rope_type: str = "default", rope_theta: float = 1e5, **others) -> dict:
    """A rotary embedding as transformers 5 writes it."""
    return {"rope_type": rope_type, "rope_theta": rope_theta, **others}


LINEAR, DYNAMIC = rope("linear", factor=4.0), rope("dynamic", factor=2.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)  # fmt: skip
SCALED = {SLIDING: rope(rope_theta=3e4), FULL: rope("linear", 1e6, factor=8.0)}

# Fields of tiny bases by family, which MLX has to read as transformers does.
READ: list[tuple[str, dict]] = [
    ("gemma3_text", {"rope_parameters": SCALED, "layer_types": [SLIDING] * 5 + [FULL]}),
    ("gemma3_text", {"layer_types": THIRD}),
    ("gemma3_text", {"layer_types": [FULL] * 6}),
    ("cohere2", {"rope_parameters": rope(), "layer_types": THIRD, **WINDOW}),
    ("exaone4", {"layer_types": IRREGULAR, "head_dim": 16, **WINDOW}),
    ("olmo3", {"rope_parameters": {SLIDING: rope(), FULL: YARN}, "layer_types": IRREGULAR, **WINDOW}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"layer_types": THIRD, **WINDOW}),
    ("smollm3", {"use_sliding_window": True, **WINDOW}),
    ("mistral", {"rope_parameters": DYNAMIC, "sliding_window": None}),
    ("qwen2", {"rope_parameters": LINEAR, **WITHOUT_SLIDING}),
    ("qwen3", {"rope_parameters": YARN}),
    ("nemotron", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
    ("phi3", {"rope_parameters": rope(), "sliding_window": None}),
    ("stablelm", {"rope_parameters": rope(partial_rotary_factor=0.75)}),
    ("qwen3_next", {"layer_types": ["linear_attention", "linear_attention", FULL] * 2}),
]

# Fields of configs by family that mlx-lm would not read, and the message.
NOT_READ: list[tuple[str, dict, str]] = [
    ("gemma3_text", {"layer_types": IRREGULAR}, "gemma3_text has there full attention in every n-th layer"),
    ("gemma3_text", {"layer_types": [SLIDING] * 6}, "gemma3_text has there full attention in every n-th layer"),
    ("cohere2", {"layer_types": IRREGULAR}, "cohere2 has there full attention in every n-th layer"),
    (
        "gemma3_text",
        {"rope_parameters": {SLIDING: LINEAR, FULL: rope()}},
        "no RoPE scaling linear in layers of sliding",
    ),
    ("olmo3", {"rope_parameters": {SLIDING: rope(rope_theta=2e5), FULL: YARN}}, "olmo3 has there one rope_theta"),
    ("llama", {"rope_parameters": SCALED}, "llama has there one rotary embedding for all layers"),
    ("gpt_oss", {"layer_types": [FULL] * 6}, "gpt_oss needs there layers of full and of sliding attention"),
    ("exaone4", {"layer_types": [FULL] * 6, **WINDOW}, "exaone4 needs there layers of full and of sliding attention"),
    ("gemma2", {"rope_parameters": LINEAR}, "gemma2 has there no RoPE scaling linear"),
    ("qwen3_moe", {"rope_parameters": YARN}, "qwen3_moe has there no RoPE scaling yarn"),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "mixtral has there no RoPE scaling linear"),
    ("mellum", {"rope_parameters": {SLIDING: rope(), FULL: LINEAR}}, "mellum has there no RoPE scaling linear"),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "the attention_factor 2.0 of its RoPE scaling"),
]
