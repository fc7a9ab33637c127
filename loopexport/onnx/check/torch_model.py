"""A quantised export in torch without its quantiser: the looped model on the numbers that the codes stand for."""

from __future__ import annotations

from typing import Any

import torch

from loopexport.export.directory import Export
from loopexport.loop.spec import Steps
from loopexport.onnx.trace.skeleton import quiet_loading
from loopexport.onnx.weights.source import open_weights
from loopexport.onnx.weights.stored_scheme import without_quantiser


def load_dequantised(export: Export, steps: Steps) -> Any:
    """The looped model of an export in fp32, with K = `steps`, on dequantised weights.

    Neither a kernel nor a package of the quantiser is needed, and activations are not rounded.

    Raises:
        OnnxError: the base was quantised in a way that a graph cannot hold.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = without_quantiser(AutoConfig.from_pretrained(export.root, trust_remote_code=True, loop_steps=steps))
    weights = open_weights(export)
    with quiet_loading():
        with torch.device("meta"):
            looped_class: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
        tensors = {name: weights.read(name) for name in weights.tensors}
        return looped_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
