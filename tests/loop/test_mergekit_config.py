"""mergekit configs: what is read from them, and what is refused by name."""

from __future__ import annotations

import pytest
import yaml

from loopexport.base.download import find_checkpoint
from loopexport.errors import SpecError
from loopexport.loop.mergekit import read_mergekit
from support.checkpoints import write_sparse_checkpoint
from support.unrolled import slices

RANGES = [(0, 15), (12, 40)]


def config(**changes) -> dict:
    """A config that repeats layers of model `org/m`, with changes at its top level."""
    return {**slices("org/m", RANGES), **changes}


def in_slice(**changes) -> dict:
    """The same with changes in its second slice."""
    first, second = config()["slices"]
    return config(slices=[first, {**second, **changes}])


def in_source(**changes) -> dict:
    """The same with changes in the source of its second slice."""
    source = {"model": "org/m", "layer_range": [12, 40]}
    return in_slice(sources=[{**source, **changes}])


@pytest.fixture
def read(tmp_path):
    """Read a config that is given as values or as text."""

    def read(values):
        file = tmp_path / "config.yml"
        file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return read_mergekit(file)

    return read


@pytest.mark.parametrize(
    "values",
    [
        config(),
        config(base_model="org/m", tokenizer_source="base", parameters={}, chat_template=None),
        config(tokenizer_source="org/m", dtype=None, out_dtype="float32"),
        config(dtype="float16", out_dtype="torch.float32"),
        in_slice(base_model="org/m"),
        in_source(model={"model": {"path": "org/m"}}),
        "merge_method: passthrough\ndtype: float32\nslices:\n- sources:\n  - layer_range: [0, 15]\n    model: org/m\n"
        "- sources:\n  - layer_range: [12, 40]\n    model: org/m\n",
    ],
    ids=lambda value: str(value)[:30],
)
def test_slices_of_one_model_are_a_path(read, values):
    found = read(values)
    assert (found.model, found.path, found.dtype, found.unknown) == ("org/m", tuple(RANGES), "float32", ())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (config(merge_method="slerp"), "merge_method 'slerp' makes new weights; a loop runs weights as they are"),
        (config(merge_method=None), "it has no merge_method; write merge_method: passthrough"),
        (config(merge_method="Passthrough"), "merge_method 'Passthrough' is not a spelling that mergekit knows; write"),
        (config(merge_method=7), "merge_method 7 makes new weights"),
        (config(dtype="bananas"), "dtype 'bananas' is not one that mergekit knows: bfloat16, float16, float32"),
        (config(out_dtype="fp16"), "out_dtype 'fp16' is not one that mergekit knows"),
        (config(dtype=["float16"]), "dtype ['float16'] is not one"),
        ("merge_method: passthrough\nslices: []\nslices: [1]\n", "key 'slices' is there twice"),
        ({**config(), "slices": None, "models": [{"model": "org/m"}]}, "models cannot be a loop; write slices"),
        (config(modules={"text_decoder": {}}), "modules cannot be a loop; give the slices of its text decoder"),
        (config(parameters={"scale": 0.5}), "parameters (scale) cannot be a loop; a loop runs weights as they are"),
        (in_slice(parameters={"scale": 1}), "parameters (scale) in slice 2 cannot be a loop"),
        (
            in_source(parameters={"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]}),
            "parameters (scale) in slice 2 cannot be a loop; a loop runs weights as they are, without scale: "
            "write it as --span with --damping to weaken repeats, or run mergekit",
        ),
        (in_slice(residual_weight=0.5), "residual_weight in slice 2 cannot be a loop; remove it"),
        (in_source(model="org/other"), "it takes layers of 2 models, org/m and org/other; a loop has one model"),
        (in_source(model="org/m@v2"), "it takes layers of 2 models, org/m and org/m@v2"),
        (config(base_model="org/other"), "base_model is org/other, and the layers are of org/m; remove base_model"),
        (in_slice(base_model="org/other"), "base_model in slice 2 is org/other, and the layers are of org/m"),
        (in_source(model="org/m+me/lora"), "slice 2 adds LoRA me/lora to org/m; merge it into the weights"),
        (in_source(model={"model": "org/m", "lora": "me/lora"}), "slice 2 adds LoRA me/lora to org/m"),
        (in_source(model={"model": "org/m", "override_architecture": "X"}), "slice 2 has override_architecture 'X'"),
        (in_source(model=7), "slice 2 names no model, but 7; write model: NAME"),
        (in_slice(sources=config()["slices"][0]["sources"] * 2), "slice 2 merges 2 sources; a loop runs weights"),
        (in_slice(sources=[]), "slice 2 has no list of sources"),
        (in_slice(sources=["org/m"]), "the source of slice 2 is 'org/m'; write slices"),
        (config(slices=["x"]), "slice 1 has no list of sources"),
        (config(slices=[]), "it has no list of slices"),
        (config(tokenizer_source="org/other"), "tokenizer_source 'org/other' is another tokenizer than that of org/m"),
        (config(tokenizer={"source": "base"}), "tokenizer cannot be a loop; an export keeps the base's tokenizer"),
        (config(chat_template="chatml"), "chat_template cannot be a loop; an export keeps the base's tokenizer"),
        (
            in_source(layer_range=[40, 12]),
            "layer_range [40, 12] of slice 2 is not [START, STOP] with 0 <= START < STOP",
        ),
        (in_source(layer_range=[-1, 12]), "layer_range [-1, 12] of slice 2"),
        (in_source(layer_range=[1, 2, 3]), "layer_range [1, 2, 3] of slice 2"),
        (in_source(layer_range=None), "layer_range None of slice 2"),
        ({"span": "1:3", "steps": 2}, "this is no mergekit config; write slices"),
        ("just text", "this is no mergekit config"),
        ("[1, 2", "is not YAML"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_a_loop_cannot_do_is_refused_by_name(read, values, says):
    with pytest.raises(SpecError) as raised:
        read(values)
    assert says in str(raised.value)
    assert str(raised.value).startswith("mergekit config ")
    assert str(raised.value).isprintable()


def test_directory_and_missing_file_are_refused(tmp_path):
    for path, says in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.yml", "No such file"),
        (7, "is not a file"),
        ("", "'' is not a file"),
    ):
        with pytest.raises(SpecError, match=says):
            read_mergekit(path)


def test_differences_from_the_merge_are_told(read, tmp_path):
    base_dir = write_sparse_checkpoint(tmp_path / "base", shards=1, shard_bytes=1000, layers_per_shard=6)
    base = find_checkpoint(str(base_dir), None, headers_only=True)
    assert list(read(config(dtype=None)).warnings(base, "org/m")) == []
    told = list(read(config(dtype="int64", parmeters={})).warnings(base, "org/M"))
    assert [line.partition("config.yml ")[2] for line in told[:2]] == [
        "has slices of org/m; they are taken as slices of org/M",
        "asks for int64; the export keeps the weights as they are, in bfloat16",
    ]
    assert told[2].endswith("has keys that mergekit does not know: parmeters")
    for values, where in (
        (in_slice(sacle=1), "sacle in slice 2"),
        (in_source(scale=0.5), "scale in the source of slice 2"),
        ({**in_source(scale=0.5), "x": 1}, "x, scale in the source of slice 2"),
    ):
        assert list(read({**values, "dtype": None}).warnings(base, "org/m")) == [
            f"{tmp_path / 'config.yml'} has keys that mergekit does not know: {where}"
        ]
    link = tmp_path / "link"
    link.symlink_to(base_dir)
    assert list(read(slices(link, RANGES) | {"dtype": None}).warnings(base, str(base_dir))) == []
