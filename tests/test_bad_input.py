"""Bad input: one clear line on stderr, exit status 1 (2 for wrong usage), nothing written, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from checkpoints import write_sparse_checkpoint
from test_convert import SPEC, run, tree

import loopexport

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
    assert tree(tmp_path) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


BAD_SPECS = [
    (["--span", "4:9", "--steps", "2"], "span 4:9 ends outside the model, which has 6 layers"),
    (["--span", "2:2", "--steps", "2"], "span 2:2 is empty"),
    (["--span", "4:2", "--steps", "2"], "span 4:2 is reversed"),
    (["--span", "-1:2", "--steps", "2"], "span -1:2 starts before the first layer"),
    (["--span", "1-3", "--steps", "2"], "for layers 1 to 3 write 1:4 (half-open)"),
    (["--span", "one", "--steps", "2"], "span 'one' is not START:STOP"),
    (["--span", "1:4", "--steps", "0"], "steps 0 must be a whole number of 1 or more"),
    (["--span", "1:4", "--steps", "-3"], "steps -3 must be"),
    (["--span", "1:4"], "the loop spec has no steps"),
    (["--steps", "2"], "the loop spec has no span"),
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
    ([*SPEC, "--revision", "main"], "--revision goes with a Hub id"),
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
    ],
)
def test_bad_spec_files_are_refused(base, tmp_path, text, says):
    (tmp_path / "loop.yaml").write_text(text)
    assert_refused(tmp_path, "convert", base, tmp_path / "out", "--spec", tmp_path / "loop.yaml", says=says)


def test_missing_spec_file_is_refused(base, tmp_path):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", "--spec", tmp_path / "none.yaml", says="cannot read")


BAD_CONFIGS = [
    ({"model_type": "martian"}, "has no model family 'martian'"),
    ({"model_type": None}, "names no model_type"),
    ({"model_type": 7}, "model_type 7"),
    ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel is not a causal language model"),
    ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "is an encoder-decoder"),
    ({"architectures": None}, "llama is not a causal language model"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"num_hidden_layers": None}, "tells no number of layers (num_hidden_layers"),
    ({"num_hidden_layers": "six"}, "'six' in "),
    ({"num_hidden_layers": -1}, "is not a number of layers"),
    ({"model_type": "looped_llama"}, "the model is looped already (looped_llama)"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_models_that_cannot_be_looped_are_refused(base, tmp_path, changes, says):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says=says)


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
    assert_refused(tmp_path, "convert", tmp_path / "none", tmp_path / "out", *SPEC, says="no directory")


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


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors", 7]
)
def test_index_that_reaches_outside_is_refused(base, tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(first_shard(base).read_bytes())
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (base / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="not a file of its own directory")


def test_index_of_pickles_is_refused(base, tmp_path):
    index = {"weight_map": {"x": "pytorch_model.bin"}}
    (base / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="which is not safetensors")


def test_index_that_promises_another_tensor_is_refused(base, tmp_path):
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["ghost"] = first_shard(base).name
    (base / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, says="places ghost in")


def test_looped_base_is_refused(base, tmp_path):
    assert run("convert", base, tmp_path / "once", *SPEC).exit_code == 0
    assert_refused(tmp_path, "convert", tmp_path / "once", tmp_path / "twice", *SPEC, says="is looped already")


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
import loopexport.cli, loopexport.conversion, loopexport.report  # imported while we may still read them
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
    import loopexport.conversion as module

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
    assert_refused(tmp_path, *command, base, *out, says="is not a LoopExport export")
    assert_refused(tmp_path, *command, tmp_path / "none", *out, says="no directory")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifest_is_refused(base, tmp_path, text):
    root = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3).root
    (root / "loopexport.json").write_text(text)
    assert_refused(tmp_path, "inspect", root, says="loopexport.json")
