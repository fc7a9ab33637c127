"""The cost of a loop, counted from the config and the weights' headers: layer evaluations, weights read, K/V bytes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib.metadata import version

from loopexport.base.checkpoint import EXPERTS, Checkpoint
from loopexport.base.families import layer_types
from loopexport.base.safetensors_header import DTYPE_BITS, Tensor
from loopexport.base.tensor_names import EMBEDDING, HEAD, is_tower, layer_of
from loopexport.templates.looped_fit import ATTENTION_TYPES

from .spec import LoopSpec

MAX_WIDTH = 2**31  # a number in a config that is not below this is ignored
TORCH_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# The config keys of each number in different families; the first one present counts.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KV_HEADS = ("kv_n_heads", "num_key_value_heads", "num_kv_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "kv_channels")
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")

# Other tensors outside the layers: tables of which a token reads one row, and modules that transformers does not run
# (multi-token prediction).
OTHER_TABLE = re.compile(
    r"(^|\.)(wpe|embed_positions|embed_tokens_per_layer|(position|token_type)_embeddings)\.\w*weight\w*$"
)
UNREAD = re.compile(r"^(model\.)?mtp\.")

# Routed experts, as a module list or fused; shared experts are called `shared_experts` and do not match.
ROUTED = re.compile(r"\.experts\.")

# Separate projections to keys and to values.
KV_PROJECTION = re.compile(r"\.(k|v)_proj\.weight$")

# Parameters of an indexer, which chooses the positions that a layer attends to.
INDEXER = re.compile(r"\.indexer\.")

# A config with one of these keys has K/V heads that differ in number or width by layer.
NUMBERS_BY_LAYER = ("per_layer_config", "global_head_dim", "swa_head_dim", "swa_num_key_value_heads")

# Names in `layer_types` of native configs for layers that keep no keys and values.
TYPES_WITHOUT_KV = ("linear_attention", "conv", "mamba", "recurrent", "mlp", "moe")

# Since this release of transformers, multi-head latent attention caches the latents instead of keys and values
# (`expand_kv` in its deepseek_v3 and others).
LATENT_CACHE_SINCE = (5, 15)


@dataclass(frozen=True)
class Cost:
    """Cost per token of the looped model and of its base; None for a number that the config does not give.

    Attributes:
        layer_evaluations: decoder layers run for one token, `L + (E K - 1) w`.
        base_layer_evaluations: the same for the base, L.
        params_read: parameters of the language model read to decode one token: each layer as often as it runs, of the
            routed experts only the chosen ones, one row of an embedding table, and everything else once. None for
            quantised weights, which pack several parameters into one element.
        base_params_read: the same for the base.
        bytes_read: the same count in bytes of the tensors in the files, quantised or not.
        base_bytes_read: the same for the base.
        kv_bytes: bytes that one token adds to all slots of the cache of the installed transformers, in the
            checkpoint's dtype. Sliding-window layers stop growing at their window.
        base_kv_bytes: the same for the base.
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
        """`layer_evaluations / base_layer_evaluations`: the factor on compute per token, head not counted."""
        return self.layer_evaluations / self.base_layer_evaluations

    def to_dict(self) -> dict:
        """The cost for `--json`: all counts and the multiplier."""
        return {**asdict(self), "multiplier": round(self.multiplier, 4)}


def layer_evaluations(num_layers: int, spec: LoopSpec) -> int:
    """Layer evaluations per token: `L + (E K - 1) w`, for K steps of E evaluations (1 for most rules) of w layers.

    If spans differ in K, or for a path, the sum over all layers.
    """
    return sum(spec.layer_runs(num_layers))


def loop_cost(base: Checkpoint, spec: LoopSpec) -> Cost:
    """Count the cost of a loop on a base.

    The natural pass is one of the evaluations of the span and writes the cache, so the cache costs no extra pass.
    """
    runs = dict(enumerate(spec.layer_runs(base.num_layers)))
    slots = runs if spec.kv == "per_step" else dict.fromkeys(spec.skipped(base.num_layers), 0)
    params, nbytes = _weights_read(base, runs)
    base_params, base_nbytes = _weights_read(base, {})
    return Cost(
        layer_evaluations=layer_evaluations(base.num_layers, spec),
        base_layer_evaluations=base.num_layers,
        params_read=params,
        base_params_read=base_params,
        bytes_read=nbytes,
        base_bytes_read=base_nbytes,
        kv_bytes=_kv_bytes(base, slots),
        base_kv_bytes=_kv_bytes(base, {}),
    )


def dtype_name(base: Checkpoint) -> str:
    """The checkpoint's dtype: its torch name from the config, or else the safetensors name of the largest tensor's."""
    named = (each.get(key) for each in (base.config, base.text_config) for key in ("dtype", "torch_dtype"))
    given = next((name for name in named if name), None)
    if isinstance(given, str):
        return given
    return max(base.tensors.values(), key=lambda tensor: tensor.nbytes).dtype if base.tensors else "dtype unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Weights.
# ---------------------------------------------------------------------------------------------------------------------


def _weights_read(base: Checkpoint, runs: dict[int, int]) -> tuple[int | None, int | None]:
    """Parameters and bytes read to decode one token; `runs` says how often layers run, if not once."""
    experts, active = _int(base.text_config, EXPERTS), _int(base.text_config, ACTIVE_EXPERTS)
    tied = not any(layer_of(name) is None and not is_tower(name) and HEAD.search(name) for name in base.tensors)
    always, routed = [0, 0], [0, 0]
    for name, tensor in base.tensors.items():
        layer = layer_of(name)
        if UNREAD.search(name) or is_tower(name) or (layer is not None and layer >= base.num_layers):
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
    """Whether a token reads only one row of a tensor; of an embedding that is also the head, it reads all."""
    return bool(OTHER_TABLE.search(name) or (not tied and EMBEDDING.search(name)))


def _rows(tensor: Tensor) -> int:
    return max(tensor.shape[0], 1) if tensor.shape else 1


def _is_routed(name: str, tensor: Tensor, experts: int | None) -> bool:
    fused = experts and len(tensor.shape) == 3 and tensor.shape[0] == experts  # fused, but not named experts
    return bool(fused or ROUTED.search(name))


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values.
# ---------------------------------------------------------------------------------------------------------------------


def _kv_bytes(base: Checkpoint, slots: dict[int, int]) -> int | None:
    """Bytes that one token adds to the cache; `slots` says how many slots layers fill, if not one."""
    dtype = dtype_name(base)
    width = TORCH_DTYPE_BYTES.get(dtype) or (0 if base.quantisation else DTYPE_BITS.get(dtype, 0) // 8)
    projected = {} if base.quantisation else _projected_numbers(base)
    numbers = [_kv_numbers(base, layer, projected) for layer in range(base.num_layers)]
    if not width or any(number is None for number in numbers):
        return None
    return width * sum(slots.get(layer, 1) * (number or 0) for layer, number in enumerate(numbers))


def _projected_numbers(base: Checkpoint) -> dict[int, int]:
    """For each layer, the rows of its projections to keys and to values; without the latter, values are the keys."""
    rows: dict[int, dict[str, int]] = {}
    for name, tensor in base.tensors.items():
        layer, match = layer_of(name), KV_PROJECTION.search(name)
        if layer is not None and match:
            rows.setdefault(layer, {})[match[1]] = _rows(tensor)
    return {layer: each["k"] + each.get("v", each["k"]) for layer, each in rows.items() if "k" in each}


def _kv_numbers(base: Checkpoint, layer: int, projected: dict[int, int]) -> int | None:
    """Count the numbers that a layer caches for one token: 0 without keys and values, None if unknown."""
    config, types = _layer_config(base.text_config, layer), layer_types(base.config)
    kind = types[layer] if types and layer < len(types) else "attention"
    if kind in TYPES_WITHOUT_KV or layer >= base.num_layers - (_int(config, ("num_kv_shared_layers",)) or 0):
        return 0
    if kind not in ATTENTION_TYPES or layer in base.recurrent_tensors:
        return None
    latent = _int(config, ("kv_lora_rank",))
    numbers = _latent_numbers(config, latent) if latent else projected.get(layer) or _attention_numbers(config)
    index = _index_numbers(base, layer)
    return None if numbers is None or index is None else numbers + index


def _layer_config(config: dict, layer: int) -> dict:
    """The config with the fields that differ in one layer, where `per_layer_config` has them."""
    by_layer = config.get("per_layer_config")
    own = by_layer.get(str(layer)) if isinstance(by_layer, dict) else None
    return {**config, **own} if isinstance(own, dict) else config


def _index_numbers(base: Checkpoint, layer: int) -> int | None:
    """Count the numbers that a layer's indexer caches for one token, 0 without an indexer: a key and, for keys that are
    pooled later, their gate and whether the token is real."""
    if not any(layer_of(name) == layer and INDEXER.search(name) for name in base.tensors):
        return 0
    width = _int(base.text_config, ("index_head_dim", "indexer_head_dim"))
    return 2 * width + 1 if width and "index_kpool" in base.text_config else width


def _latent_numbers(config: dict, latent: int) -> int | None:
    """Multi-head latent attention: the latent and the rotated keys; in older releases, keys and values by head."""
    rope = _int(config, ("qk_rope_head_dim",)) or 0
    if tuple(map(int, version("transformers").split(".")[:2])) >= LATENT_CACHE_SINCE:
        return latent + rope
    heads, nope, value = (_int(config, keys) for keys in (HEADS, ("qk_nope_head_dim",), ("v_head_dim",)))
    return heads * (nope + rope + value) if heads and nope and value else None


def _attention_numbers(config: dict) -> int | None:
    """Keys and values of all K/V heads, for a config whose layers are all alike; None for others."""
    if any(config.get(key) for key in NUMBERS_BY_LAYER):
        return None
    own = config.get("attn_config")  # some families nest the attention's config
    config = {**config, **own} if isinstance(own, dict) else config
    heads, hidden = _int(config, HEADS), _int(config, HIDDEN)
    kv_heads = _int(config, KV_HEADS) or heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        kv_heads = 1
    head_dim = _int(config, HEAD_DIM) or (hidden // heads if hidden and heads else None)
    value_dim = _int(config, ("v_head_dim",)) or head_dim
    return kv_heads * (head_dim + value_dim) if kv_heads and head_dim and value_dim else None


def _int(config: dict, keys: tuple[str, ...]) -> int | None:
    """The value of the first of these keys that holds a whole number from 0 to `MAX_WIDTH`; None if none does."""
    numbers = (config[key] for key in keys if key in config)
    return next((number for number in numbers if type(number) is int and 0 <= number < MAX_WIDTH), None)
