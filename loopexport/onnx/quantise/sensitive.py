"""Which layers lose most by 4 bits: the values and the second half of the MLP, in the outer layers and in every third.

Source: the model builder of onnxruntime-genai 0.18, `make_matmul_mixed_precision`, which follows llama.cpp's `Q4_K_M`.
"""

from __future__ import annotations

import re

from loopexport.export.quantisation import Quantisation

_LAYER = re.compile(r"\.(\d+)\.")
# Projections that make values, alone or together with others, and those that end an MLP, as the families name them.
_VALUES = ("v_proj", "qkv_proj", "query_key_value", "c_attn", "kv_b_proj", "Wqkv", "W_pack")
_DOWN = ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out")
_SENSITIVE = re.compile(rf"\.({'|'.join(map(re.escape, (*_VALUES, *_DOWN)))})\.weight$")


def is_sensitive(name: str, num_layers: int, quantisation: Quantisation) -> bool:
    """Whether a weight gets 8 bits in a mixed quantisation.

    Args:
        name: of the weight.
        num_layers: number of decoder layers.
        quantisation: what the user chose.
    """
    layer = _LAYER.search(name)
    if not quantisation.mixed or layer is None or not _SENSITIVE.search(name):
        return False
    index, eighth = int(layer[1]), num_layers / 8
    return index < eighth or index >= 7 * eighth or (index - round(eighth)) % 3 == 2
