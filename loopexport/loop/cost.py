"""What a loop costs, counted from the config and the weights' headers: layer evaluations, weights read, K/V bytes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib.metadata import version

from loopexport.base.checkpoint import EXPERTS, Checkpoint, layer_of
from loopexport.base.families import layer_types
from loopexport.base.safetensors_header import DTYPE_BITS, Tensor
from loopexport.templates.looped_spec import ATTENTION_TYPES

from .spec import LoopSpec

MAX_WIDTH = 2**31  # of anything in a model; a config with a larger number is not to be taken at its word
TORCH_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# What families call the same number in their configs; the first that is set counts.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KV_HEADS = ("kv_n_heads", "num_key_value_heads", "num_kv_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "kv_channels")
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")

# Tensors outside the layers, by the name of their module: the table of token embeddings, which may be the head as well;
# other tables, of which one row is read; heads; and what transformers leaves unread (multi-token prediction).
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|w|((word|tok)_)?embeddings)\.\w*weight\w*$")
OTHER_TABLE = re.compile(
    r"(^|\.)(wpe|embed_positions|embed_tokens_per_layer|(position|token_type)_embeddings)\.\w*weight\w*$"
)
HEAD = re.compile(
    r"(^|\.)(((generator_)?lm_head|predictions)(\.decoder)?|embed_out|output(_projection)?)\.\w*weight\w*$"
    r"|^decoder\.\w*weight\w*$"
)
UNREAD = re.compile(r"^(model\.)?mtp\.")

# Routed experts, module list or fused; shared ones are called `shared_experts`.
ROUTED = re.compile(r"\.experts\.")

# Projections to keys and to values, where they are tensors of their own.
KV_PROJECTION = re.compile(r"\.(k|v)_proj\.weight$")

# Keys of a config whose K/V heads differ in number or width by layer.
NUMBERS_BY_LAYER = ("per_layer_config", "global_head_dim", "swa_head_dim", "swa_num_key_value_heads")

# Types of layers, by `layer_types` of native configs, that keep no keys and values.
TYPES_WITHOUT_KV = ("linear_attention", "conv", "mamba", "recurrent", "mlp", "moe")

# The release of transformers from which multi-head latent attention keeps the latents instead of keys and values
# (`expand_kv` of its deepseek_v3 and others).
LATENT_CACHE_SINCE = (5, 15)


@dataclass(frozen=True)
class Cost:
    """Cost per token, looped against base. None where it cannot be told from the config.

    Attributes:
        layer_evaluations: decoder layers run for one token, `L + (E K - 1) w`, and `base_layer_evaluations`, L.
        params_read: parameters read to decode one token, and `base_params_read`: layers as often as they run, of the
            routed experts those that a token is sent to, of embedding tables one row, everything else once. None for
            quantised weights, which pack several into an element.
        bytes_read: the same in bytes of the file's tensors, quantised or not, and `base_bytes_read`.
        kv_bytes: bytes that one token adds to the cache that the installed transformers keeps, all slots, in the
            checkpoint's dtype, and `base_kv_bytes`. Sliding-window layers stop growing at their window.
    """

    layer_evaluations: int
    base_layer_evaluations: int
    params_read: int | None
    base_params_read: int | None
    bytes_read: int | None
    base_bytes_read: int | None
    kv_bytes: int | None
    base_kv_bytes: int | None

    @property
    def multiplier(self) -> float:
        """Layer evaluations against the base: the compute a token takes, attention to the head left out."""
        return self.layer_evaluations / self.base_layer_evaluations

    def to_dict(self) -> dict:
        """All counts, and the multiplier."""
        return {**asdict(self), "multiplier": round(self.multiplier, 4)}


def loop_cost(base: Checkpoint, spec: LoopSpec) -> Cost:
    """Count the cost of a loop on a base.

    `L + (E K - 1) w` layer evaluations, with K steps of E evaluations each of a span of w layers (E is 1 for most
    rules): the natural pass is one of them and writes the cache, so no pass is spent on that alone.
    """
    runs = dict.fromkeys(spec.layers, spec.evaluations)
    slots = runs if spec.extra_kv_slots else {}
    params, nbytes = _weights_read(base, runs)
    base_params, base_nbytes = _weights_read(base, {})
    return Cost(
        layer_evaluations=base.num_layers + sum(runs.values()) - len(runs),
        base_layer_evaluations=base.num_layers,
        params_read=params,
        base_params_read=base_params,
        bytes_read=nbytes,
        base_bytes_read=base_nbytes,
        kv_bytes=_kv_bytes(base, slots),
        base_kv_bytes=_kv_bytes(base, {}),
    )


def dtype_name(base: Checkpoint) -> str:
    """The checkpoint's dtype, as torch calls it where the config says it, else as its largest tensor has it."""
    named = base.config.get("dtype") or base.config.get("torch_dtype")
    if isinstance(named, str):
        return named
    return max(base.tensors.values(), key=lambda tensor: tensor.nbytes).dtype if base.tensors else "dtype unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Weights.
# ---------------------------------------------------------------------------------------------------------------------


def _weights_read(base: Checkpoint, runs: dict[int, int]) -> tuple[int | None, int | None]:
    """Parameters and bytes read to decode one token; `runs` tells how often a layer runs, where not once."""
    experts, active = _int(base.config, EXPERTS), _int(base.config, ACTIVE_EXPERTS)
    tied = not any(layer_of(name) is None and HEAD.search(name) for name in base.tensors)
    always, routed = [0, 0], [0, 0]
    for name, tensor in base.tensors.items():
        layer = layer_of(name)
        if UNREAD.search(name) or (layer is not None and layer >= base.num_layers):
            continue
        times = 1 if layer is None else runs.get(layer, 1)
        rows = _rows(tensor) if layer is None and _is_looked_up(name, tied) else 1
        total = routed if layer is not None and _is_routed(name, tensor, experts) else always
        total[0] += times * tensor.num_elements // rows
        total[1] += times * tensor.nbytes // rows
    if not base.tensors or (routed[1] and not (experts and active)):
        return None, None
    params, nbytes = (each + rest * (active or 0) // (experts or 1) for each, rest in zip(always, routed, strict=True))
    return (None if base.quantisation else params), nbytes


def _is_looked_up(name: str, tied: bool) -> bool:
    """Whether one row of a tensor is read, rather than all: not of an embedding that is the head as well."""
    return bool(OTHER_TABLE.search(name) or (not tied and EMBEDDING.search(name)))


def _rows(tensor: Tensor) -> int:
    return max(tensor.shape[0], 1) if tensor.shape else 1


def _is_routed(name: str, tensor: Tensor, experts: int | None) -> bool:
    fused = experts and len(tensor.shape) == 3 and tensor.shape[0] == experts  # where no module is called experts
    return bool(fused or ROUTED.search(name))


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values.
# ---------------------------------------------------------------------------------------------------------------------


def _kv_bytes(base: Checkpoint, slots: dict[int, int]) -> int | None:
    """Bytes that one token adds to the cache; `slots` tells how many a layer has, where not one."""
    dtype = dtype_name(base)
    width = TORCH_DTYPE_BYTES.get(dtype) or (0 if base.quantisation else DTYPE_BITS.get(dtype, 0) // 8)
    projected = {} if base.quantisation else _projected_numbers(base)
    numbers = [_kv_numbers(base, layer, projected) for layer in range(base.num_layers)]
    if not width or any(number is None for number in numbers):
        return None
    return width * sum(slots.get(layer, 1) * (number or 0) for layer, number in enumerate(numbers))


def _projected_numbers(base: Checkpoint) -> dict[int, int]:
    """By layer, the rows of its projections to keys and values; without one to values, those are the keys again."""
    rows: dict[int, dict[str, int]] = {}
    for name, tensor in base.tensors.items():
        layer, match = layer_of(name), KV_PROJECTION.search(name)
        if layer is not None and match:
            rows.setdefault(layer, {})[match[1]] = _rows(tensor)
    return {layer: each["k"] + each.get("v", each["k"]) for layer, each in rows.items() if "k" in each}


def _kv_numbers(base: Checkpoint, layer: int, projected: dict[int, int]) -> int | None:
    """How many numbers one layer keeps of a token: 0 where it keeps no keys and values, None where that is unclear."""
    config, types = base.config, layer_types(base.config)
    kind = types[layer] if types and layer < len(types) else "attention"
    if kind in TYPES_WITHOUT_KV or layer >= base.num_layers - (_int(config, ("num_kv_shared_layers",)) or 0):
        return 0
    if kind not in ATTENTION_TYPES or layer in base.recurrent_tensors:
        return None
    latent = _int(config, ("kv_lora_rank",))
    if latent:
        return _latent_numbers(config, latent)
    return projected.get(layer) or _attention_numbers(config)


def _latent_numbers(config: dict, latent: int) -> int | None:
    """Multi-head latent attention: the latent and the rotated keys; in older releases each head's keys and values."""
    rope = _int(config, ("qk_rope_head_dim",)) or 0
    if tuple(map(int, version("transformers").split(".")[:2])) >= LATENT_CACHE_SINCE:
        return latent + rope
    heads, nope, value = (_int(config, keys) for keys in (HEADS, ("qk_nope_head_dim",), ("v_head_dim",)))
    return heads * (nope + rope + value) if heads and nope and value else None


def _attention_numbers(config: dict) -> int | None:
    """Keys and values of all K/V heads, of a config that has one number of each for all layers."""
    if any(config.get(key) for key in NUMBERS_BY_LAYER):
        return None
    own = config.get("attn_config")  # a config of attention's own
    config = {**config, **own} if isinstance(own, dict) else config
    heads, hidden = _int(config, HEADS), _int(config, HIDDEN)
    kv_heads = _int(config, KV_HEADS) or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    head_dim = _int(config, HEAD_DIM) or (hidden // heads if hidden and heads else None)
    value_dim = _int(config, ("v_head_dim",)) or head_dim
    return kv_heads * (head_dim + value_dim) if kv_heads and head_dim and value_dim else None


def _int(config: dict, keys: tuple[str, ...]) -> int | None:
    """The first of these that the config gives as a whole number, not below zero and not beyond belief."""
    numbers = (config[key] for key in keys if key in config)
    return next((number for number in numbers if type(number) is int and 0 <= number < MAX_WIDTH), None)
