"""What an older export loses to a new one at its place is said, and trained weights are never lost."""

from __future__ import annotations

import json

import pytest

import loopexport
from loopexport.export.results_file import RESULTS
from support.commands import run
from support.tiny import SPAN
from support.trained import save_trained

AGAIN = ("--span", "1:4", "--steps", "5", "--overwrite")


@pytest.fixture
def base(tiny_base):
    return tiny_base()


@pytest.fixture
def out(base, tmp_path):
    loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3)
    return tmp_path / "out"


@pytest.fixture
def trained(export_dir, tmp_path):
    root = save_trained(export_dir(), tmp_path / "tuned")
    loopexport.adopt(root)
    return root


def notes(*command):
    done = run(*command, "--json")
    assert done.exit_code == 0, done.stderr
    return [warning for warning in json.loads(done.stdout)["warnings"] if "loses" in warning or "mlx-lm" in warning]


def test_what_was_added_or_edited_is_named_before_and_while_it_goes(base, out):
    assert notes("convert", base, out, *AGAIN, "--dry-run") == []
    (out / "notes.txt").write_text("mine")
    (out / RESULTS).write_text("{}")
    (out / "base").mkdir(exist_ok=True)
    (out / "base" / "note").write_text("mine")
    for name in ("README.md", "generation_config.json"):
        (out / name).write_text("edited")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "loop_steps": 4}))
    names = f"{RESULTS}, notes.txt, base/note, README.md, config.json, generation_config.json"
    said = [f"{out} loses what was added to it or edited since it was converted: {names}"]
    assert notes("convert", base, out, *AGAIN, "--dry-run") == said
    assert notes("convert", base, out, *AGAIN) == said
    assert notes("convert", base, out, *AGAIN) == []


def test_an_export_that_mlx_loads_says_so(base, out):
    assert run("mlx", out).exit_code == 0
    assert notes("convert", base, out, *AGAIN, "--mlx", "--dry-run") == []
    [note] = notes("convert", base, out, *AGAIN)
    assert note == f"mlx-lm loads {out} now, and would not load the new export; add --mlx to keep that"


def test_a_damaged_export_is_replaced_without_a_word(base, out):
    (out / "config.json").unlink()
    manifest = json.loads((out / "loopexport.json").read_text())
    (out / "loopexport.json").write_text(json.dumps({**manifest, "weights": 1}))
    assert notes("convert", base, out, *AGAIN) == []


def test_trained_weights_are_not_replaced(base, trained, export_dir, tmp_path):
    before = (trained / "model.safetensors").read_bytes()
    refused = run("convert", base, trained, *AGAIN)
    assert (refused.exit_code, "holds weights that were trained, perhaps the only copy" in refused.stderr) == (1, True)
    refused = run("onnx", export_dir(), "--out", trained, "--overwrite", "--no-verify")
    assert (refused.exit_code, "holds weights that were trained" in refused.stderr) == (1, True)
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_copy_of_trained_weights_may_be_made_again_with_graphs(trained, tmp_path):
    copy = tmp_path / "copy"
    loopexport.export_onnx(trained, out=copy, verify=False)
    (copy / "notes.txt").write_text("mine")
    [note] = notes("onnx", trained, "--out", copy, "--overwrite", "--no-verify")
    assert "notes.txt" in note
    assert not (copy / "notes.txt").exists()
