"""Bad input: one clear line on stderr, exit status 1 (2 for wrong usage), nothing written, nothing lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import loopexport
from loopexport.export.card import read_metadata
from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, run, tree

INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path):
    return write_sparse_checkpoint(tmp_path / "base", shards=2, shard_bytes=40_000, layers_per_shard=3)


def assert_refused(tmp_path, *arguments, says, status=1):
    """The command fails with one line that contains `says`, and leaves `tmp_path` as it was."""
    before = tree(tmp_path)
    result = run(*arguments)
    assert result.exit_code == status, (result.exit_code, result.stdout, result.stderr)
    assert says in result.stderr, result.stderr
    if status == 1:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert ".partial" not in result.stderr, "the user knows the output by its own name alone"
    assert tree(tmp_path) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


BAD_SPECS = [
    (["--span", "4:9", "--steps", "2"], "span 4:9 ends outside the model, which has 6 layers"),
    (["--span", "2:2", "--steps", "2"], "span 2:2 is empty"),
    (["--span", "4:2", "--steps", "2"], "span 4:2 is reversed"),
    (["--span", "-1:2", "--steps", "2"], "span -1:2 starts before the first layer"),
    (["--span", "1-3", "--steps", "2"], "for layers 1 to 3 write 1:4 (half-open)"),
    (["--span", "one", "--steps", "2"], "span 'one' is not START:STOP"),
    (["--span", "1:4", "--steps", "0"], "steps 0 must be a whole number from 1"),
    (["--span", "1:4", "--steps", "-3"], "steps -3 must be"),
    (["--span", "1:4", "--steps", str(10**400)], "to 2147483647"),
    (["--span", f"1:{'9' * 5000}", "--steps", "2"], "is not START:STOP"),
    (["--span", "1:4"], "the loop spec has no steps"),
    (["--steps", "2"], "the loop spec has no span; give one, such as --span 12:20"),
    ([*SPEC, "--decode", "first_n"], "decode first_n needs first_n"),
    ([*SPEC, "--first-n", "2"], "first_n 2 needs decode first_n, not full"),
    ([*SPEC, "--damping", "nan"], "damping nan must be a step size in (0, 1]"),
    ([*SPEC, "--damping", "inf"], "damping inf must be"),
    ([*SPEC, "--damping", "0"], "damping 0.0 must be"),
    ([*SPEC, "--damping", "1.5"], "damping 1.5 must be"),
    ([*SPEC, "--anchor", "nan"], "anchor nan must be a weight in [0, 1]"),
    ([*SPEC, "--anchor", "-inf"], "anchor -inf must be"),
    ([*SPEC, "--anchor", "1.01"], "anchor 1.01 must be"),
    ([*SPEC, "--anchor", "-0.1"], "anchor -0.1 must be"),
    ([*SPEC, "--mode", "spiral"], "mode 'spiral' must be one of block, layer"),
    ([*SPEC, "--kv", "own"], "kv 'own' must be one of shared, per_step, reference"),
    ([*SPEC, "--decode", "some"], "decode 'some' must be one of full, bypass, first_n"),
    ([*SPEC, "--first-n", "-1"], "first_n -1 must be"),
    ([*SPEC, "--first-n", str(10**400)], "to 2147483647"),
    ([*SPEC, "--rule", "martian\nrule"], "rule 'martian\\nrule' must be one of"),
    ([*SPEC, "--revision", "main"], "--revision needs a Hub id"),
]


@pytest.mark.parametrize(("options", "says"), BAD_SPECS, ids=lambda value: str(value)[:40])
def test_impossible_specs_are_refused(base, tmp_path, options, says):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *options, says=says)


@pytest.mark.parametrize(
    "options", [["--steps", "two"], ["--weights", "telepathy"], ["--nonsense"], ["--damping", "x"]], ids=str
)
def test_wrong_usage_exits_with_2(base, tmp_path, options):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, *options, says="Usage:", status=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("span: 1:4\nsteps: 3\nstep_size: 0.5\n", "unknown key 'step_size'"),
        ("just a string", "is not a mapping"),
        ("span: [1, 4\n", "is not YAML"),
        ("span: [1, 2, 3]\nsteps: 2\n", "span [1, 2, 3] is not a pair"),
        ("span: 1:4\nsteps: yes\n", "steps True must be"),
        ("span: 1:4\nsteps: 3\nkv: [shared]\n", "kv ['shared'] must be one of"),
        ("model: other\nout: there\n", "unknown key 'model'"),
        ("null: 3\n1: 2\nx: 4\n", "unknown key None"),
        ("span: 740\nsteps: 3\n", "span 740 is not a pair"),
        ("span: &a [x, *a]\nsteps: 3\n", "span 'x' is not START:STOP"),
        (f"span: 1:4\nsteps: 3\ndamping: 1{'0' * 400}\n", "must be a step size"),
        (f"span: 1:4\nsteps: 1{'0' * 6000}\n", "is not YAML"),
        ("span: 1:4\nsteps: !!bool maybe\n", "is not YAML"),
        ("span: 1:4\nsteps: !!timestamp soon\n", "is not YAML"),
        ("span: 1:4\nsteps: !!int ''\n", "is not YAML"),
        ('span: "\\U00110000"\n', "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("span: 2024-99-99\nsteps: 3\n", "span '2024-99-99' is not START:STOP"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_spec_files_are_refused(base, tmp_path, text, says):
    (tmp_path / "loop.yaml").write_text(text)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", "--spec", tmp_path / "loop.yaml", says=says)


def test_numbers_of_a_spec_file_are_decimal(base, tmp_path):
    (tmp_path / "loop.yaml").write_text("span: [0:1, 2:4]\nsteps: 3\ndamping: 1e-3\n")
    spec = json.loads(run("convert", base, "out", "--spec", tmp_path / "loop.yaml", "--json", "--dry-run").stdout)[
        "spec"
    ]
    assert (spec["loop_span"], spec["loop_damping"]) == ([[0, 1], [2, 4]], 0.001)


def test_missing_spec_file_is_refused(base, tmp_path):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", "--spec", tmp_path / "none.yaml", says="cannot read")


BAD_CONFIGS = [
    ({"model_type": "martian"}, "has no model family 'martian'"),
    ({"model_type": None}, "has no model_type"),
    ({"model_type": 7}, "model_type 7"),
    ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel is not a causal language model"),
    ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is an encoder-decoder"),
    ({"architectures": None}, "llama is not a causal language model"),
    ({"architectures": "LlamaForCausalLM"}, "is not a list of class names"),
    ({"architectures": {"LlamaForCausalLM": 1}}, "is not a list of class names"),
    ({"architectures": 7}, "architectures 7"),
    ({"architectures": ["LlamaForCausalLM", None]}, "is not a list of class names"),
    ({"num_hidden_layers": 10**12}, "is not a number of layers from 1 to 100,000"),
    ({"model_type": "mar\ntian\x1b[31m"}, "'mar\\ntian\\x1b[31m'"),
    ({"num_hidden_layers": None}, "gives no number of layers (num_hidden_layers"),
    ({"num_hidden_layers": "six"}, "'six' in "),
    ({"num_hidden_layers": -1}, "is not a number of layers"),
    ({"loop_num_passes": 3}, "has loop_num_passes, but names with loop_ are reserved for the loop"),
    ({"model_type": "looped_llama"}, "the model is looped already (looped_llama)"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_models_that_cannot_be_looped_are_refused(base, tmp_path, changes, says):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": float("nan"), "limit": float("inf")},
        {"note": "half a character \ud800"},
        {"hidden_size": "wide", "num_attention_heads": [4, 4], "head_dim": -1},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 10**4000, "head_dim": 10**4000, "hidden_size": True},
        {"loop_span": "mine", "loop_steps": {}, "auto_map": [7], "self": 1, "__class__": 2},
        {"quantization_config": ["?"], "layer_types": "full", "dtype": {"x": 1}},
    ],
    ids=str,
)
def test_odd_configs_of_possible_models_are_exported_whole(base, tmp_path, changes):
    config = {**json.loads((base / "config.json").read_text()), **changes}
    (base / "config.json").write_text(json.dumps(config))
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [key for key in changes if key != "auto_map" and not key.startswith("loop_")]
    assert [json.dumps(exported[key]) for key in kept] == [json.dumps(changes[key]) for key in kept]
    for command in (["inspect"], ["inspect", "--json"], ["verify", "--files-only"]):
        result = run(command[0], tmp_path / "out", *command[1:])
        assert result.exit_code == 0, result.stdout
    assert run("restore", tmp_path / "out", tmp_path / "back").exit_code == 0
    assert tree(tmp_path / "back") == tree(base)


def test_config_that_cannot_be_written_again_is_refused(base, tmp_path):
    text = (base / "config.json").read_text()
    for depth in (985, 2000):
        (base / "config.json").write_text(f'{text[:-1]}, "deep": {"[" * depth}{"]" * depth}}}')
        for options in (["--dry-run"], []):
            assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, *options, says="config.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is not JSON"), ("[]", "is not a JSON object"), ("", "is not JSON"), ("[" * 100_000, "is not JSON")],
    ids=["cut off", "list", "empty", "deep"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_refused(base, tmp_path, name, text, says):
    (base / name).write_text(text)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


def test_directory_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path, "convert", tmp_path / "empty", tmp_path / "out", *SPEC, says="no config.json in")


def test_missing_directory_is_refused(tmp_path):
    says = " is neither a directory nor a Hub id; give a model directory, or a Hub id such as org/name"
    assert_refused(tmp_path, "convert", tmp_path / "none", tmp_path / "out", *SPEC, says=f"{tmp_path / 'none'}{says}")
    assert_refused(tmp_path, "convert", "./none", tmp_path / "out", *SPEC, says=f"./none{says}")


def test_file_in_place_of_a_model_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path, "convert", tmp_path / "model.gguf", tmp_path / "out", *SPEC, says="is a file")


@pytest.mark.parametrize(
    ("name", "remedy"), [("model.Q4.gguf", "gguf_file="), ("pytorch_model.bin", "save_pretrained"), ("a.pth", "save_")]
)
def test_weights_in_other_formats_are_refused_with_the_way_out(base, tmp_path, name, remedy):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / name).write_bytes(b"?")
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=remedy)


def test_no_weights_at_all_are_refused(base, tmp_path):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="no weights in")


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
    text = json.dumps({f"layers.{'9' * 5000}.w": entry(0, 8)})
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
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


def test_looped_base_is_refused(base, tmp_path):
    assert run("convert", base, tmp_path / "once", *SPEC).exit_code == 0
    command = ["convert", tmp_path / "once", tmp_path / "twice", *SPEC]
    assert_refused(tmp_path, *command, says=f"or run `loopexport restore {tmp_path / 'once'} OUT` and convert OUT")
    (tmp_path / "once" / "loopexport.json").unlink()  # without it, restore cannot work
    assert_refused(tmp_path, *command, says="is looped already (looped_llama); change the loop_* fields")
    assert "restore" not in run(*command).stderr


def test_output_that_exists_is_refused(base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for options in ([], ["--overwrite"]):
        assert_refused(tmp_path, "convert", base, tmp_path / "full", *SPEC, *options, says="is not a LoopExport export")


def test_output_that_is_a_file_or_a_link_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        assert_refused(tmp_path, "convert", base, tmp_path / name, *SPEC, says="exists and is not a directory")


def test_output_inside_or_around_the_model_is_refused(base, tmp_path):
    (tmp_path / "link").symlink_to(base)
    for out, says in (
        (base / "looped", "lies inside the model"),
        (base / "deep" / "er", "lies inside the model"),
        (tmp_path / "link" / "looped", "lies inside the model"),
        (base, "is the model itself"),
        (tmp_path, "contains the model"),
    ):
        assert_refused(tmp_path, "convert", base, out, *SPEC, "--overwrite", says=says)


def test_output_below_a_file_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(tmp_path, "convert", base, tmp_path / "file" / "out", *SPEC, says="cannot write into")


AS_ANOTHER_USER = """
import os, sys
import loopexport.cli, loopexport.cli.text, loopexport.export.conversion  # imported while we may still read them
from tqdm import tqdm
if os.geteuid() == 0:
    os.seteuid(65534)
loopexport.cli.main(sys.argv[1:])
"""


def test_read_only_target_is_refused(base, tmp_path):
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to(tempfile.gettempdir()) and path.name != "tmp":
            path.chmod(0o755)  # the other user has to come this far
    target = tmp_path / "read-only"
    target.mkdir(mode=0o555)
    command = [sys.executable, "-c", AS_ANOTHER_USER, "convert", str(base), str(target / "out"), *SPEC]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"Error: cannot write into {target}" in done.stderr
    assert not list(target.iterdir())


def test_unreadable_model_is_refused(base, tmp_path):
    base.chmod(0o000)
    command = [sys.executable, "-c", AS_ANOTHER_USER, "convert", str(base / "inner"), str(tmp_path / "out"), *SPEC]
    done = subprocess.run(command, capture_output=True, text=True)
    base.chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "Permission denied" in done.stderr


def test_too_little_space_is_seen_before_copying(base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    says = "has 1,000 bytes free where"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, "--weights", "copy", says=says)


def test_disk_that_fills_up_while_copying_leaves_nothing(base, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, "--weights", "copy", says="no space left for")


def test_file_that_cannot_be_written_is_told_by_its_place_in_the_output(base, tmp_path, monkeypatch):
    real = Path.write_bytes

    def refuse(path, content):
        if path.name == "modeling_looped.py":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    says = f"cannot write {tmp_path / 'out'}: Permission denied ({tmp_path / 'out' / 'modeling_looped.py'})"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)
    monkeypatch.chdir(tmp_path)
    says = f"cannot write out: Permission denied ({Path('out') / 'modeling_looped.py'})"
    assert_refused(tmp_path, "convert", base, "out", *SPEC, says=says)


def test_interrupt_leaves_nothing_and_exits_with_130(base, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    before = tree(tmp_path)
    monkeypatch.setattr(os, "copy_file_range", interrupt)
    result = run("convert", base, tmp_path / "out", *SPEC, "--weights", "copy")
    assert (result.exit_code, tree(tmp_path)) == (130, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_hardlink_across_file_systems_is_refused(base, tmp_path, monkeypatch):
    def other_device(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    says = "use --weights auto or copy"
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, "--weights", "hardlink", says=says)


def test_output_that_appears_meanwhile_is_left_alone(base, tmp_path, monkeypatch):
    import loopexport.export.conversion as module

    real = module._place_weights

    def slow(plan, root, progress):
        plan.out.mkdir()
        (plan.out / "other.txt").write_text("somebody else's")
        return real(plan, root, progress)

    monkeypatch.setattr(module, "_place_weights", slow)
    result = run("convert", base, tmp_path / "out", *SPEC)
    assert result.exit_code == 1
    assert tree(tmp_path / "out").keys() == {"other.txt"}


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["restore"]], ids=str)
def test_directory_that_is_no_export_is_refused(base, tmp_path, command):
    out = [tmp_path / "out"] if command == ["restore"] else []
    assert_refused(tmp_path, *command, base, *out, says="it has no loopexport.json; give a directory that `loopexport")
    assert_refused(tmp_path, *command, tmp_path / "none", *out, says="no directory")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifest_is_refused(base, tmp_path, text):
    root = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3).root
    (root / "loopexport.json").write_text(text)
    assert_refused(tmp_path, "inspect", root, says="loopexport.json")


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def circle(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


@pytest.mark.parametrize("put", [pipe, folder, endless, circle])
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_what_is_no_file_in_the_place_of_one_is_refused(base, tmp_path, put, name):
    put(base / name)
    result = run("convert", base, tmp_path / "out", *SPEC)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert any(says in result.stderr for says in ("is not a", "Too many levels", "no weights in")), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("put", [pipe, folder, endless, circle])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "README.md", "model.safetensors", "base", "loopexport.json", "LICENSE"]
)
def test_what_is_no_file_stays_behind_where_none_is_needed(base, tmp_path, put, name):
    put(base / name)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    assert (name in tree(tmp_path / "out")) == (name in ("README.md", "loopexport.json"))


def test_files_of_any_name_stay_behind_and_are_listed_in_one_line(base, tmp_path):
    names = [b"x\ny", b"\xff", b"\x1b[2J", b"LICENSE.\xff", b"x" * 255, b"base", b"loopexport.json", b"Config.json"]
    for name in names:
        (base / os.fsdecode(name)).write_text("{}")
    planned = run("convert", base, tmp_path / "out", *SPEC, "--dry-run")
    assert planned.stdout.count("\n") == run("convert", base, tmp_path / "out", *SPEC).stdout.count("\n")
    assert "x\\ny" in planned.stdout
    left = json.loads((tmp_path / "out" / "loopexport.json").read_text())["left_behind"]
    assert left == sorted(map(os.fsdecode, names))


def test_folders_nested_ever_so_deep_stay_behind(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(tmp_path)
    try:
        assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    finally:  # deeper than pytest's own cleaning up can go
        subprocess.run(["rm", "-rf", base / "d"], check=True)


@pytest.mark.parametrize("name", [b"x\ny", b"\xff", b"\x1b[2J", b"~nobody-here", b" "], ids=str)
def test_base_and_output_may_have_any_name(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    num_lines = run("convert", base, "plain", *SPEC, "--dry-run").stdout.count("\n")
    base = base.rename(tmp_path / os.fsdecode(name))
    (tmp_path / "out").mkdir()
    result = run("convert", base, os.path.join("out", os.fsdecode(name)), *SPEC)
    assert (result.exit_code, result.stdout.count("\n")) == (0, num_lines), result.stderr
    assert run("restore", tmp_path / "out" / os.fsdecode(name), tmp_path / "back").exit_code == 0
    assert tree(tmp_path / "back") == tree(base)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x" * 201, "must be of 200 bytes at most"),
        ("x/" * 3000, "File name too long"),
        ("circle", "is not a directory"),
        ("circle/x", "cannot write into"),
        ("nowhere/x", "cannot write into"),
    ],
    ids=lambda value: value[:20],
)
def test_outputs_that_cannot_be_are_refused_by_the_dry_run_too(base, tmp_path, monkeypatch, out, says):
    monkeypatch.chdir(tmp_path)
    circle(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to("none")
    for options in (["--dry-run"], []):
        assert_refused(tmp_path, "convert", base, out, *SPEC, *options, says=says)


def test_output_may_be_the_empty_directory_where_one_stands(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("convert", base, ".", *SPEC).exit_code == 0
    assert loopexport.open_export(tmp_path / "here").spec.steps == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "here"]


@pytest.mark.parametrize("text", ["{}", "[]", "thesis", '{"format": 1}'])
def test_overwrite_takes_no_other_directory_with_a_file_of_the_manifests_name(base, tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "loopexport.json").write_text(text)
    says = "is not a LoopExport export"
    assert_refused(tmp_path, "convert", base, tmp_path / "mine", *SPEC, "--overwrite", says=says)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model-00001-of-00002.safetensors"])
def test_unreadable_file_of_the_base_is_named_by_the_dry_run_too(base, tmp_path, name):
    (base / name).touch()
    (base / name).chmod(0o000)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path.is_relative_to(tempfile.gettempdir()) and path.name != "tmp":
            path.chmod(0o755)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o777)
    for options in (["--dry-run"], []):
        command = ["convert", str(base), str(tmp_path / "ours" / "out"), *SPEC, *options]
        done = subprocess.run([sys.executable, "-c", AS_ANOTHER_USER, *command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"Error: cannot read {base / name}: Permission denied\n")
    assert not list((tmp_path / "ours").iterdir())


def test_source_that_turns_unreadable_is_not_taken_for_the_output(tmp_path):
    from loopexport.files.placement import place, xxh3_of

    for read in (lambda: place(tmp_path / "none", tmp_path / "out", "copy"), lambda: xxh3_of(tmp_path / "none")):
        with pytest.raises(loopexport.errors.CheckpointError, match=r"cannot read .*none: No such file"):
            read()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["license: 2024-99-99", "license: !!bool maybe", "[" * 5000, 'license: "\\ud800"', "license: &a [*a]", "? {}"],
)
def test_odd_card_of_the_base_is_no_obstacle(base, tmp_path, text):
    (base / "README.md").write_text(f"---\n{text}\n---\n# Base\n")
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0


def test_norwegian_is_not_read_as_false(base, tmp_path):
    (base / "README.md").write_text("---\nlanguage: [en, no]\nlicense: mit\n---\n# Base\n")
    root = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3).root
    assert read_metadata((root / "README.md").read_text())["language"] == ["en", "no"]


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 5000, b"null", b'{"auto_map": "\\ud800", "x": "\\udfff"}'], ids=str
)
def test_odd_tokenizer_config_is_no_obstacle(base, tmp_path, content):
    (base / "tokenizer_config.json").write_bytes(content)
    assert run("convert", base, tmp_path / "out", *SPEC).exit_code == 0
    assert run("restore", tmp_path / "out", tmp_path / "back").exit_code == 0
    assert tree(tmp_path / "back") == tree(base)


@pytest.fixture
def export(base, tmp_path):
    (base / "LICENSE").write_text("free")
    return loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3, weights="copy").root


BAD_RECORDS = [
    ("files", "../secret"),
    ("files", "base/../../secret"),
    ("files", "/etc/hostname"),
    ("files", "a\nb"),
    ("files", "a//b"),
    ("weights", "../secret"),
]


@pytest.mark.parametrize(("group", "name"), BAD_RECORDS)
def test_manifest_that_reaches_outside_is_refused(export, tmp_path, group, name):
    (tmp_path / "secret").write_text("theirs")
    manifest = json.loads((export / "loopexport.json").read_text())
    record = {"size": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}
    manifest[group][name] = record
    (export / "loopexport.json").write_text(json.dumps(manifest))
    for command in (["inspect"], ["verify", "--files-only"], ["restore"]):
        out = [tmp_path / "deep" / "back"] if command == ["restore"] else []
        assert_refused(tmp_path, *command[:1], export, *out, *command[1:], says="is not a file name inside an export")


@pytest.mark.parametrize(
    "changes",
    [
        {"loopexport": 7},
        {"base": {"name": 7}},
        {"base": {"name": "x", "revision": 7}},
        {"spec": {"span": [4, 1], "steps": 3}},
        {"weights": {"a": {"size": "big"}}},
        {"files": {"a": {"size": 1, "sha256": []}}},
        {"left_behind": [7]},
        {"weights_method": None},
    ],
    ids=str,
)
def test_manifest_with_values_of_other_types_is_refused(export, tmp_path, changes):
    manifest = json.loads((export / "loopexport.json").read_text())
    (export / "loopexport.json").write_text(json.dumps({**manifest, **changes}))
    assert_refused(tmp_path, "inspect", export, says="loopexport.json is damaged")


@pytest.mark.parametrize(
    ("group", "name"),
    [("files", "LICENSE"), ("files", "base/config.json"), ("files", "modeling_looped.py"), ("weights", None)],
)
def test_files_that_the_manifest_does_not_know_are_no_part_of_an_intact_export(export, tmp_path, group, name):
    manifest = json.loads((export / "loopexport.json").read_text())
    del manifest[group][name or next(iter(manifest[group]))]
    (export / "loopexport.json").write_text(json.dumps(manifest))
    verified = run("verify", export, "--files-only")
    assert (verified.exit_code, "is not recorded in it" in verified.stdout) == (1, True)
    assert_refused(tmp_path, "restore", export, tmp_path / "back", says="is not recorded in it")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loop_span": [0, 10**12]}, "ends outside the model"),
        ({"loop_steps": 10**400}, "to 2147483647"),
        ({"num_hidden_layers": "six"}, "is not a number of layers"),
        ({"model_type": 7}, "model_type 7"),
    ],
)
def test_export_whose_config_was_edited_to_an_impossible_one_is_refused(export, tmp_path, changes, says):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, **changes}))
    for command in (["inspect"], ["verify", "--files-only"]):
        assert_refused(tmp_path, command[0], export, *command[1:], says=says)


def test_types_of_config_values_are_told_apart(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "vocab_size": float(config["vocab_size"])}))
    verified = run("verify", export, "--files-only")
    assert (verified.exit_code, "differs from the base's in vocab_size" in verified.stdout) == (1, True)
