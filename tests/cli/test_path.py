"""`loopexport path`, and the options of `convert` that say in other words which layers loop."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

import loopexport
from support.commands import run
from support.damage import edit_config
from support.refusals import assert_refused
from support.unrolled import slices

TWICE = {"loop_span": [1, 4], "loop_steps": 2, "loop_damping": 1.0, "loop_kv": "per_step"}
DRAWINGS = {
    ("--span", "1:4", "--steps", "3"): """\
layer     0    5
  0-3     ====
  1-3 x2   ~~~    again, blended, s = 0.3333
  4-5         ==
""",
    ("--span", "1:2x2", "--span", "3:5x4", "--kv", "per_step"): """\
layer     0    5
    0     =
    1 x2   ~      in a row, blended, s = 0.5
  2-4       ===
  3-4 x3     ~~   again, blended, s = 0.25
    5          =
""",
    ("--span", "1:4", "--steps", "3", "--mode", "layer", "--damping", "1"): """\
layer     0    5
    0     =
  1-3 x3   ###    each in turn
  4-5         ==
""",
    ("--span", "1:4", "--steps", "2", "--rule", "heun"): """\
layer     0    5
  0-3     ====
  1-3 x3   ~~~    again, blended by heun, s = 0.5
  4-5         ==
""",
    ("--path", "0-3,2-3,1-2,1-2,5"): """\
layer     0    5
  0-3     ====
  2-3       ##    again
  1-2 x2   ##     again
    4         .   left out
    5          =
""",
    ("--span", "1:4", "--steps", "1"): """\
layer   0    5
  0-5   ======
""",
}


@pytest.mark.parametrize("options", DRAWINGS, ids=lambda options: " ".join(options)[:40])
def test_loops_are_drawn(base, options):
    printed = run("path", base, *options)
    assert printed.exit_code == 0, printed.stderr
    assert DRAWINGS[options] in printed.stdout
    assert max(map(len, printed.stdout.splitlines())) <= 120


def test_drawing_of_a_deep_model_fits_the_screen(tmp_path):
    from support.checkpoints import write_sparse_checkpoint

    deep = write_sparse_checkpoint(tmp_path / "deep", shards=1, shard_bytes=1000, layers_per_shard=100)
    lines = run("path", deep, "--span", "40:60", "--steps", "4").stdout.splitlines()
    rows = [line for line in lines if set("=~") & set(line) and not line.startswith(("Loop", "Note"))]
    assert [row[10:50].rstrip() for row in rows] == ["=" * 24, " " * 16 + "~" * 8, " " * 24 + "=" * 16]


def test_totals_are_told(base):
    text = run("path", base, "--path", "0-3,1-2,1-2,5").stdout
    assert "Loop     each visit runs the layer as it is, kv per_step" in text
    assert "Total    9 layer evaluations a token instead of 6: 1.50x" in text
    assert "K/V      9 slots of the cache instead of 6; each evaluation has its own" in text
    assert "Same as" not in text
    assert "Note     the path leaves out layer 4\n" in text
    shared = run("path", base, "--span", "1:4", "--steps", "2", "--damping", "1", "--decode", "bypass").stdout
    assert "Total    9 layer evaluations a token instead of 6: 1.50x; decode steps run at the base's cost" in shared
    assert (
        "K/V      6 slots of the cache instead of 6; layers that run again read those of their natural pass" in shared
    )
    assert "Same as  --path 0:4,1:6 --kv shared --decode bypass\n" in shared
    assert "Same as" not in run("path", base, "--span", "1:4", "--steps", "2").stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv", "shared"], "repeats attend to the keys and values of the first visit, kv shared"),
        (["--kv", "reference"], "the first visit for the past, and to their own in the current chunk, kv reference"),
        (["--steps", "1"], "switched off by steps 1: the base model, kv per_step"),
    ],
)
def test_a_path_says_how_its_repeats_run(base, tmp_path, options, says):
    for command in (["path", base], ["convert", base, tmp_path / "out", "--dry-run"]):
        text = run(*command, "--path", "0-3,2-3,1-5", *options).stdout
        assert says in text
        assert "runs the layer as it is" not in text
        assert ("half-open: switched off, layers 0 to 5 run once\n" in text) == ("--steps" in options)


def test_the_path_that_is_told_is_the_same_loop(base):
    for options in (["--rys", "1,4"], ["--span", "0:2x3", "--span", "3:4x2", "--damping", "1"]):
        told = run("path", base, *options, "--json")
        path = json.loads(told.stdout)["same_as_path"]
        again = run("path", base, "--path", ",".join(f"{a}:{b}" for a, b in path), "--json")
        ours, theirs = json.loads(told.stdout), json.loads(again.stdout)
        for key in ("route", "runs", "same_as_path", "layer_evaluations"):
            assert ours[key] == theirs[key]


def test_json_has_the_route(base):
    values = json.loads(run("path", base, "--path", "0-3,2-3,1-2,5", "--json").stdout)
    assert values["route"] == [
        {"layers": [0, 4], "kind": "natural", "times": 1},
        {"layers": [2, 4], "kind": "again", "times": 1, "blended": False, "step_size": 1.0},
        {"layers": [1, 3], "kind": "again", "times": 1, "blended": False, "step_size": 1.0},
        {"layers": [4, 5], "kind": "left out", "times": 0},
        {"layers": [5, 6], "kind": "natural", "times": 1},
    ]
    assert (values["runs"], values["left_out"]) == ([1, 2, 3, 2, 0, 1], [4])
    assert (values["layer_evaluations"], values["cache_slots"]) == (9, 9)
    assert values["warnings"][0] == "the path leaves out layer 4"


def test_path_of_an_export_is_its_own(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", path="0-3,2-3,1-2,1-5").root
    own, _, same = run("path", out).stdout.partition("Same as")
    assert own.partition("layer")[2] in run("path", base, "--path", "0-3,2-3,1-2,1-5").stdout
    assert same == "  --path 0:4,2:4,1:3,1:6\n"
    for options in (["--rys", "1,2"], ["--kv", "shared"], ["--preset", "x"], ["--spec", "nowhere.yml"]):
        says = f"is an export and has its own loop; give its base for {options[0]}, or leave it out"
        assert_refused(tmp_path, "path", out, *options, says=says)


def test_path_of_an_export_takes_no_options_of_a_base(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", path="0-3,2-3,1-2,1-5").root
    for options, says in {
        ("--revision", "main"): "out is an export; give its base for --revision, or leave it out",
        ("--text-only", "--without-adapter"): "its base for --without-adapter and --text-only, or leave them out",
        ("--kv", "shared", "--text-only"): "has its own loop; give its base for --kv and --text-only, or leave them",
    }.items():
        assert_refused(tmp_path, "path", out, *options, says=says)


def test_path_needs_a_loop_or_an_export(base):
    assert run("path", base).exit_code == 2
    assert "no directory" in run("path", "nowhere", "--rys", "1,2").stderr


def test_path_loads_no_torch(base):
    code = (
        "import sys; from loopexport.cli import main\n"
        f"try: main(['path', {str(base)!r}, '--rys', '1,3'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "\n"


# --- The same options of `convert` and in a spec file ----------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, base):
    """A mergekit config of the base that runs layers 1 to 3 twice."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(slices(base, [(0, 4), (1, 6)])))
    return path


def planned(*options) -> dict:
    result = run("convert", *options, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_all_spellings_are_the_same_loop(base, tmp_path, recipe):
    for options in (
        ["--path", "0-3,1-5"],
        ["--path", "0..3,1..3,4..5"],
        ["--path", "0:4,1:6"],
        ["--rys", "1,4"],
        ["--from-mergekit", recipe],
        ["--span", "1:4x2", "--damping", "1", "--kv", "per_step"],
    ):
        spec = planned(base, tmp_path / "out", *options)["spec"]
        assert {name: spec[name] for name in TWICE} == TWICE, options
        assert "loop_path" not in spec
        lines = run("convert", base, tmp_path / "out", *options, "--dry-run").stdout.splitlines()
        assert lines[1].startswith("Span     1:4, half-open: layers 1 to 3 of 0 to 5")
        assert lines[2] == "Loop     2 steps, rule euler, s = 1, anchor 0"


def test_spec_file_says_it_too(base, tmp_path, recipe):
    for text in (
        "path: 0-3,1-5",
        "path: [0-3, [1, 6]]",
        "rys: 1,4",
        "rys: [1, 4]",
        f"from_mergekit: {recipe}",
        "from_mergekit: config.yml",
    ):
        (tmp_path / "loop.yaml").write_text(text)
        spec = planned(base, tmp_path / "out", "--spec", tmp_path / "loop.yaml")["spec"]
        assert {name: spec[name] for name in TWICE} == TWICE, text
    spec = planned(base, tmp_path / "out", "--spec", tmp_path / "loop.yaml", "--span", "2:3x4")["spec"]
    assert (spec["loop_span"], spec["loop_steps"], spec["loop_kv"]) == ([2, 3], 4, "shared")


def test_a_place_on_the_command_line_replaces_the_loop_of_the_file(base, tmp_path):
    (tmp_path / "loop.yaml").write_text("span: 1:4\nsteps: 3\ndamping: 0.5\nkv: shared\ndecode: bypass\n")
    for options in (["--path", "0-3,1-5"], ["--rys", "1,4"]):
        spec = planned(base, tmp_path / "out", "--spec", tmp_path / "loop.yaml", *options)["spec"]
        assert {name: spec[name] for name in (*TWICE, "loop_decode")} == {**TWICE, "loop_decode": "bypass"}


def test_kv_shared_is_said_to_help_only_if_every_step_loops(base, tmp_path):
    for decode, is_said in (("full", True), ("bypass", False)):
        notes = planned(base, tmp_path / "out", "--rys", "1,4", "--kv", "reference", "--decode", decode)["warnings"]
        told = next(note for note in notes if note.startswith("kv reference: by design, cached decoding differs"))
        assert told.endswith("with kv shared they are equal") == is_said


def test_rys_pair_takes_other_fields(base, tmp_path):
    spec = planned(base, tmp_path / "out", "--rys", "1,4", "--damping", "0.5", "--kv", "shared", "--steps", "3")["spec"]
    assert (spec["loop_span"], spec["loop_steps"], spec["loop_damping"], spec["loop_kv"]) == ([1, 4], 3, 0.5, "shared")


def test_paths_that_spans_cannot_tell_stay_paths(base, tmp_path):
    plan = planned(base, tmp_path / "out", "--path", "0-3,2-3,1-2,1-4")
    assert plan["spec"]["loop_path"] == [[0, 4], [2, 4], [1, 3], [1, 5]]
    assert plan["warnings"][0] == "the path leaves out layer 5, so it ends before the last layer"
    assert (plan["cost"]["layer_evaluations"], plan["layers"]) == (12, [1, 2, 3])
    text = run("convert", base, tmp_path / "out", "--path", "0-3,2-3,1-2,1-4", "--dry-run").stdout
    assert "Path     0:4,2:4,1:3,1:5, half-open: layers 1 to 3 of 0 to 5 more than once, without layer 5\n" in text


def test_differences_from_a_merge_are_notes(base, tmp_path, recipe):
    recipe.write_text(recipe.read_text().replace(str(base), "org/model").replace("float32", "int64"))
    notes = planned(base, tmp_path / "out", "--from-mergekit", recipe)["warnings"]
    assert notes[0] == f"{recipe} has slices of org/model; they are taken as slices of {base}"
    assert "asks for int64; the export keeps the weights as they are" in notes[1]
    recipe.write_text(recipe.read_text().replace("- 6", "- 7"))
    refused = run("convert", base, tmp_path / "out", "--from-mergekit", recipe)
    assert refused.stderr == (
        f"Error: mergekit config {recipe}: the path visits layer 6, and the model has layers 0 to 5\n"
    )


def test_default_output_names_the_layers_that_run_again(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, name in {
        ("--span", "1:3x2", "--span", "4:6x3"): "base-looped-1-3-4-6-k2-3",
        ("--rys", "1,4"): "base-looped-1-4-k2",
        ("--path", "0-3,2-3,1-2,1-5"): "base-looped-0-4-2-4-1-3-1-6-path",
        ("--path", "0-3,2-3,1-5"): "base-looped-0-4-2-4-1-6-path",
        ("--path", "0-3,2-3,1-5", "--steps", "1"): "base-looped-0-4-2-4-1-6-path-k1",
        ("--path", "0-3"): "base-looped-0-4-path",
    }.items():
        assert planned(base, *options)["out"] == name


def test_names_of_long_paths_are_short_and_differ(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [planned(base, "--path", f"0-4,{'2-3,' * 20}{last}-5")["out"] for last in (0, 1)]
    assert names[0] != names[1]
    for name, layers in zip(names, ("0-5", "1-5"), strict=True):
        assert re.fullmatch(f"base-looped-{layers}-[0-9a-f]{{8}}-path", name)


def test_export_takes_another_way_to_say_it(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=2, weights="copy").root
    edit_config(out, loop_span=None, loop_path=[[0, 4], [2, 6]])
    assert run("verify", out, "--files-only").exit_code == 0
    text = run("inspect", out).stdout
    assert "Path     0:4,2:6, half-open: layers 2 to 3 of 0 to 5 more than once" in text
    assert "Edited   since: span (1, 4) -> None, path None -> ((0, 4), (2, 6))" in text
