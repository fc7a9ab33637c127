"""Damaged weights, impossible headers and indexes are refused in one line."""

from __future__ import annotations

import json
import os

import pytest

from support.commands import SPEC, run
from support.refusals import INDEX, assert_refused


def first_shard(base):
    return min(base.glob("*.safetensors"))


def truncate(base):
    os.truncate(first_shard(base), first_shard(base).stat().st_size - 5)


def lengthen(base):
    with first_shard(base).open("ab") as file:
        file.write(b"more")


def cut_into_header(base):
    os.truncate(first_shard(base), 20)


def empty(base):
    os.truncate(first_shard(base), 0)


def scramble_header(base):
    with first_shard(base).open("r+b") as file:
        file.seek(8)
        file.write(b"not json")


def contradict_shape(base):
    path = first_shard(base)
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F32" ', 1))


def remove(base):
    first_shard(base).unlink()


def dangle(base):
    remove(base)
    (base / "model-00001-of-00002.safetensors").symlink_to(base / "nowhere")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "it is damaged, download it again"),
        (lengthen, "it is damaged, download it again"),
        (cut_into_header, "is not a whole safetensors file"),
        (empty, "is not a whole safetensors file"),
        (scramble_header, "no readable safetensors header"),
        (contradict_shape, "no readable safetensors header"),
        (remove, "weights file model-00001-of-00002.safetensors is missing"),
        (dangle, "weights file model-00001-of-00002.safetensors is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_weights_are_refused(base, tmp_path, damage, says):
    damage(base)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


def entry(start, end, **changes):
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **changes}


BAD_HEADERS = {
    "overlap": json.dumps({"a": entry(0, 4), "b": entry(2, 8)}),
    "hole": json.dumps({"a": entry(0, 4), "b": entry(5, 8)}),
    "start": json.dumps({"a": entry(1, 8)}),
    "true for 1": json.dumps({"a": entry(0, 8, shape=[8, True])}),
    "dtype of another type": json.dumps({"a": entry(0, 8, dtype=["U8"])}),
    "more elements than bits": json.dumps({"a": entry(0, 8, dtype="NEW", shape=[10**10, 10**9])}),
    "half a character": json.dumps({"a\ud800": entry(0, 8)}),
    "metadata": json.dumps({"a": entry(0, 8), "__metadata__": {"epoch": 3}}),
    "space before": " " + json.dumps({"a": entry(0, 8)}),
    "list": "[]",
    "deep": "[" * 5000,
}


@pytest.mark.parametrize("text", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_impossible_weights_headers_are_refused(base, tmp_path, text):
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
    says = "no readable safetensors header"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


def test_weights_without_tensors_are_refused(base, tmp_path):
    (base / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="holds no tensors")


def test_numbers_in_tensor_names_that_are_no_layers_are_ignored(base, tmp_path):
    layers = [f"model.layers.{layer}.w" for layer in range(6)]
    names = [f"layers.{'9' * 5000}.w", "lm_head.weight", "model.norm.weight", *layers]
    text = json.dumps({name: entry(4 * place, 4 * place + 4) for place, name in enumerate(names)})
    content = len(text).to_bytes(8, "little") + text.encode() + bytes(4 * len(names))
    (base / "model.safetensors").write_bytes(content)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        7,
        "a\nb.safetensors",
        "a\0b.safetensors",
        "\ud800.safetensors",
    ],
)
def test_index_that_reaches_outside_is_refused(base, tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(first_shard(base).read_bytes())
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (base / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="not a plain file name")


def test_index_of_pickles_is_refused(base, tmp_path):
    index = {"weight_map": {"x": "pytorch_model.bin"}}
    (base / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="which is not safetensors")


def test_index_that_promises_another_tensor_is_refused(base, tmp_path):
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["ghost"] = first_shard(base).name
    (base / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="holds ghost, but it does not")


@pytest.mark.parametrize("metadata", [None, [], "7"], ids=str)
def test_index_that_transformers_cannot_read_is_refused(base, tmp_path, metadata):
    index = {**json.loads((base / INDEX).read_text()), "metadata": metadata}
    for each in (index, {"weight_map": index["weight_map"]}):
        (base / INDEX).write_text(json.dumps(each))
        assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says='add "metadata": {} to it')
