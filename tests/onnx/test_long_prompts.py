"""Long prompts: parts of a prompt equal the whole, caches stay right in place, and memory does not grow with steps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

import loopexport
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import load_torch
from loopexport.onnx.runtime.prefill import Cuts, find_cuts
from support.tiny import VOCAB

NEW = 10
LENGTHS = (9, 4, 13)
SPECS = ({"steps": 3}, {"steps": 3, "kv": "per_step", "decode": "bypass"})


def padded(rows, side):
    """Token ids and mask of rows of different lengths."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("attention", ["portable", "gqa"])
def test_rows_of_any_length_in_any_parts_generate_the_tokens_of_torch(graph, attention, spec, monkeypatch):
    """Room for few positions, so that it has to grow."""
    monkeypatch.setattr("loopexport.onnx.runtime.cache._SPARE_POSITIONS", 2)
    root = graph("llama", attention, **spec)
    model, reference = OnnxModel(root), load_torch(root, 3)
    rows = [np.random.default_rng(length).integers(5, VOCAB, size=length) for length in LENGTHS]
    alone = [
        reference.generate(torch.from_numpy(row[None]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)[
            0, len(row) :
        ].tolist()
        for row in rows
    ]
    for chunk in (None, 2, 5):
        together = model.generate(*padded(rows, "left"), max_new_tokens=NEW, eos_token_ids=(), prefill_chunk=chunk)
        assert together.tolist() == alone, chunk
        one = model.generate(rows[2][None], max_new_tokens=NEW, eos_token_ids=(), prefill_chunk=chunk)
        assert one.tolist() == alone[2:], chunk
    right = model.generate(*padded(rows, "right"), max_new_tokens=NEW, eos_token_ids=())
    assert right.tolist() == alone


def test_caches_that_share_memory_stay_right(graph):
    model = OnnxModel(graph("llama", "gqa", steps=3))
    ids = np.random.default_rng(0).integers(5, VOCAB, size=(1, 12))
    whole = model.forward(ids)[0]
    _, start = model.forward(ids[:, :5])
    _, other = model.forward(ids[:, 7:10], cache=start)
    logits, cache = model.forward(ids[:, 5:8], cache=start)
    assert cache.storage is not start.storage  # the other has written there
    assert model.forward(ids[:, 8:9], cache=cache)[1].storage is cache.storage
    for ours, theirs in ((logits, whole[:, 5:8]), (model.forward(ids[:, 8:], cache=cache)[0], whole[:, 8:])):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(whole).max()
    again = model.forward(np.concatenate([ids[:, :5], ids[:, 7:10], ids[:, :1]], axis=1))[0]
    assert np.abs(model.forward(ids[:, :1], cache=other)[0] - again[:, -1:]).max() < 1e-5 * np.abs(again).max()


def test_runs_at_the_same_time_never_add_to_one_storage(graph):
    model = OnnxModel(graph("llama", "gqa", steps=3))
    _, start = model.forward(np.array([[5, 6, 7]]))
    first, second = (model.slots.with_room(start, 5) for _ in range(2))
    assert first.storage is start.storage
    assert second.storage is not start.storage


def test_cache_of_a_graph_of_another_layout_is_refused(graph):
    """Its tensors have the same names."""
    ids = np.array([[5, 6, 7]])
    models = [OnnxModel(graph("llama", attention, steps=3)) for attention in ("gqa", "portable")]
    for model, other in (models, models[::-1]):
        with pytest.raises(ValueError, match="the cache belongs to another graph"):
            model.forward(ids, cache=other.forward(ids)[1])
    fewer = OnnxModel(graph("llama", "gqa", steps=1))
    assert fewer.forward(ids[:, :1], cache=models[0].forward(ids)[1])[0].shape[1] == 1


def test_gqa_graph_of_an_earlier_version_runs_several_prompts_whole(graph):
    """It joins past and new keys itself, and names no onnxruntime."""
    root = graph("llama", "gqa", steps=3, kv="per_step", decode="bypass")
    ids = np.random.default_rng(3).integers(5, VOCAB, size=(2, 9))
    alone = OnnxModel(root).generate(ids, max_new_tokens=4, eos_token_ids=())
    earlier = ir.load(root / "model.onnx")
    del earlier.metadata_props["min_onnxruntime"]
    ir.save(earlier, root / "model.onnx")
    model = OnnxModel(root)
    assert not model.slots.in_place
    for rows in (ids, ids[:1]):
        ours = model.generate(rows, max_new_tokens=4, eos_token_ids=(), prefill_chunk=3)
        assert ours.tolist() == alone[: len(rows)].tolist()
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(loopexport.LoopExportError, match="an earlier version and takes no padded batch"):
        model.generate(ids, mask)


@pytest.mark.parametrize("attention", ["portable", "gqa"])
def test_fewer_logits_are_the_last_and_the_graph_computes_no_others(graph, attention):
    model = OnnxModel(graph("llama", attention, steps=3))
    ids = np.array([[5, 6, 7, 8]])
    whole = model.forward(ids)[0]
    assert np.allclose(model.forward(ids, num_logits=2)[0], whole[:, -2:], rtol=0, atol=1e-5)
    shapes = []
    run = model.run
    model.run = lambda *args, **named: shapes.append(run(*args, **named)) or shapes[-1]
    model.generate(ids, max_new_tokens=2, eos_token_ids=())
    assert [logits.shape[1] for logits, _ in shapes] == [1, 1]
    model._inputs.discard("num_logits_to_keep")  # as in graphs of earlier versions
    assert np.array_equal(model.forward(ids, num_logits=2)[0], whole[:, -2:])
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"num_logits {wrong} must be 1 to 4"):
            model.forward(ids, num_logits=wrong)


def test_storage_grows_on_a_device_as_on_the_host(graph):
    """Without CUDA, the graph that copies on a device runs on the CPU."""
    model = OnnxModel(graph("llama", "gqa", steps=3))
    _, cache = model.forward(np.array([[5, 6, 7]]))
    room = cache.storage.room
    for name, value in cache.values.items():
        longer, copied = model.slots._lengthened(name, value, 4), model.slots._copied(name, value, 3, room + 4)
        there, here = longer.numpy(), copied.numpy()  # views of memory that the values keep
        assert there.shape == here.shape
        assert np.array_equal(there[:, :, :3], here[:, :, :3])
        assert not there[:, :, 3:].any()


@pytest.mark.parametrize("attention", ["portable", "gqa"])
def test_decoding_keeps_no_memory_for_each_step(graph, attention):
    """ONNX Runtime's memory patterns are one more block for each length, which stays."""
    model = OnnxModel(graph("llama", attention, steps=3), threads=1)
    list(model.stream(np.array([[5, 6, 7]]), max_new_tokens=30, eos_token_ids=()))
    before = resident_kib()
    list(model.stream(np.array([[5, 6, 7]]), max_new_tokens=250, eos_token_ids=()))
    assert resident_kib() - before < 1500


def resident_kib():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("config", "metadata", "parts"),
    [
        ({}, {}, [(0, 4), (4, 8), (8, 11)]),
        ({}, {"loop_rule": '"anderson"', "loop_steps": "1"}, [(0, 4), (4, 8), (8, 11)]),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 5}}, {}, [(0, 6), (6, 11)]),
        (
            {"original_max_position_embeddings": 5, "rope_parameters": {"full": {"rope_type": "longrope"}}},
            {},
            [(0, 6), (6, 11)],
        ),
        ({"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 30}, {}, [(0, 4), (4, 8), (8, 11)]),
    ],
)
def test_prompts_are_cut_where_parts_equal_the_whole(config, metadata, parts):
    assert find_cuts(config, metadata).parts(11, 1, 4) == parts


def test_no_part_is_one_token_and_the_automatic_size_is_for_all_rows():
    assert Cuts().parts(9, 1, 4) == [(0, 4), (4, 9)]
    assert Cuts().parts(1, 1, None) == [(0, 1)]
    assert Cuts().parts(513, 1, None) == [(0, 513)]
    assert Cuts().parts(514, 1, None) == [(0, 512), (512, 514)]
    assert Cuts().parts(512, 4, None)[0] == (0, 128)


@pytest.mark.parametrize(
    ("config", "metadata", "says"),
    [
        ({}, {"loop_rule": '"anderson"', "loop_steps": "3"}, "rule anderson fits one mix"),
        ({"text_config": {"rope_parameters": {"rope_type": "dynamic"}}}, {}, "rotary frequencies depend on the length"),
    ],
)
def test_prompts_that_must_be_whole_are_not_cut(config, metadata, says):
    cuts = find_cuts(config, metadata)
    assert cuts.parts(9999, 1, None) == [(0, 9999)]
    assert cuts.parts(11, 1, 11) == [(0, 11)]
    with pytest.raises(loopexport.LoopExportError, match=says):
        cuts.parts(11, 1, 4)
    with pytest.raises(ValueError, match="prefill_chunk 1 must be 2 or more"):
        cuts.parts(11, 1, 1)
