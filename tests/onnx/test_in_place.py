"""Fused attention with one buffer, longer than the tokens, as past and present."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from loopexport.onnx import OnnxModel

LOOPS = (
    {"steps": 6},
    {"steps": 3, "decode": "bypass", "kv": "per_step"},
    {"steps": 3, "decode": "bypass", "kv": "reference"},
)
MORE_LOOPS = (
    {"steps": 1},
    {"steps": 2},
    {"steps": 3, "kv": "per_step"},
    {"steps": 3, "kv": "reference"},
    {"steps": 3, "decode": "bypass"},
)
LENGTH = 24
CHUNKS = (7, 1, 1, 4, 1)


@pytest.mark.parametrize(
    "spec", [*LOOPS, *(pytest.param(spec, marks=pytest.mark.matrix) for spec in MORE_LOOPS)], ids=str
)
def test_one_buffer_as_past_and_present_changes_nothing(graph, spec):
    """An iteration under `shared` reads the natural keys from a buffer that the natural pass has just written."""
    model = OnnxModel(graph("llama", "gqa", **spec))
    model.slots.in_place = False  # so that past and present have memory of their own
    tokens = np.random.default_rng(4).integers(5, 100, size=(1, sum(CHUNKS)))
    names = list(model.empty_cache(1).values)
    shape = [1, *(model.empty_cache(1).values[names[0]].shape()[1::2])]
    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(np.full((1, shape[1], LENGTH, shape[2]), np.nan, np.float32))
        for name in names
    }
    cache, start = None, 0
    for length in CHUNKS:
        ids = tokens[:, start : start + length]
        theirs, cache = model.forward(ids, None, cache)
        start += length
        binding = model.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, start), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(start - length, start)[None])
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        model.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        assert np.abs(logits - theirs).max() <= 1e-5 * np.abs(theirs).max()
    for name, value in cache.values.items():
        held = buffers[name].numpy()[:, :, :start]
        assert np.abs(held - value.numpy()).max() <= 1e-5 * np.abs(held).max(), name
