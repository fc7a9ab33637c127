"""What a loop costs, counted from the config and the weights' headers: layer evaluations, parameters, K/V bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .checkpoint import Checkpoint
from .safetensors_header import DTYPE_BITS
from .spec import LoopSpec

TORCH_DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Cost:
    """Cost per token, looped against base. K/V bytes are None where the config does not tell, parameters are where the
    weights are not at hand.

    Attributes:
        layer_evaluations: decoder layers run for one token, `L + (E-1) * w`, and `base_layer_evaluations`, L.
        params_read: parameters read to decode one token (layers as often as they run, norm, and head; of the
            embedding one row), and `base_params_read`.
        kv_bytes: bytes added to the cache by one token, all slots, in the checkpoint's dtype, and `base_kv_bytes`.
            Sliding-window layers stop growing at their window.
    """

    layer_evaluations: int
    base_layer_evaluations: int
    params_read: int | None
    base_params_read: int | None
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

    `L + (E-1) * w` layer evaluations, with E evaluations of the span (K for most rules): the natural pass writes the
    cache, so no pass is spent on that alone.
    """
    iterations = spec.evaluations - 1
    looped_params = sum(base.layer_params.get(layer, 0) for layer in spec.layers)
    params = _params_read(base)
    slot_bytes = _kv_bytes_per_slot(base)
    slots = base.num_layers + spec.extra_kv_slots
    return Cost(
        layer_evaluations=base.num_layers + iterations * len(spec.layers),
        base_layer_evaluations=base.num_layers,
        params_read=None if params is None else params + iterations * looped_params,
        base_params_read=params,
        kv_bytes=None if slot_bytes is None else slots * slot_bytes,
        base_kv_bytes=None if slot_bytes is None else base.num_layers * slot_bytes,
    )


def dtype_name(base: Checkpoint) -> str:
    """The checkpoint's dtype, as torch calls it where the config says it, else as its largest tensor has it."""
    named = base.config.get("dtype") or base.config.get("torch_dtype")
    if isinstance(named, str):
        return named
    return max(base.tensors.values(), key=lambda tensor: tensor.nbytes).dtype if base.tensors else "dtype unknown"


def _params_read(base: Checkpoint) -> int | None:
    """Parameters read to decode one token by the base: all but the embedding, unless that is the head as well."""
    if not base.tensors:
        return None
    total = sum(tensor.num_elements for tensor in base.tensors.values())
    has_own_head = any(name.endswith("lm_head.weight") for name in base.tensors)
    embedding = next((t for name, t in base.tensors.items() if name.endswith("embed_tokens.weight")), None)
    return total - embedding.num_elements if has_own_head and embedding else total


def _kv_bytes_per_slot(base: Checkpoint) -> int | None:
    config = base.config
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    hidden = config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    name = dtype_name(base)
    width = TORCH_DTYPE_BYTES.get(name) or DTYPE_BITS.get(name, 0) // 8
    return 2 * kv_heads * head_dim * width if kv_heads and head_dim and width else None
