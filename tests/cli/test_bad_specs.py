"""Impossible loops, wrong usage and bad spec files: one clear line on stderr, exit status 1 (2 for wrong usage)."""

from __future__ import annotations

import json

import pytest

import loopexport
from loopexport.export.card import read_metadata
from support.commands import SPEC, run
from support.refusals import assert_refused

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
    ([*SPEC, "--first-n", "-1"], "first_n -1 must be"),
    ([*SPEC, "--first-n", str(10**400)], "to 2147483647"),
    ([*SPEC, "--revision", "main"], "--revision needs a Hub id"),
    (["--path", "0-3,2-9"], "the path visits layer 9, and the model has layers 0 to 5"),
    (["--path", "0-3,2-1"], "has '2-1', which goes backwards or is empty"),
    (["--path", "0-2,4,3-5"], "the path first visits layer 3 after layer 4"),
    (["--path", "2-5"], "the path starts at layer 2; it must start at layer 0"),
    (["--path", "0-5"], "the path 0-5 runs every layer once, as the base model does"),
    (["--path", "0-3,2-5", "--damping", "0.5"], "a path runs each layer as it is, without damping"),
    (["--path", "0-4", "--decode", "bypass"], "the path leaves out layer 5"),
    (["--path", "0-3,2-5", *SPEC], "span and path both say which layers loop; give one of them"),
    (["--rys", "1,7"], "rys 1,7 is span 1:7, twice: span 1:7 ends outside the model, which has 6 layers"),
    (["--rys", "4,2"], "rys 4,2 runs no layer twice: give I < J"),
    (["--rys", "1,3", "--path", "0-3"], "path and rys both say which layers loop"),
    (["--span", "1:3x2", "--steps", "2"], "steps 2 and a span with its own number of steps were given"),
    (["--span", "1:3x2", "--span", "4:5"], "write all of them as 8:12x2"),
    (["--span", "1:3X2"], "span '1:3X2' is not START:STOP or START:STOPxK"),
    (["--span", "autox2"], "span 'autox2' is not START:STOP or START:STOPxK"),
    (["--path", "0-3,2-5", "--steps", "2"], "a path says how often each layer runs: leave steps out"),
    (["--from-mergekit", ""], "from_mergekit '' is not a file"),
    (["--span", "1:3x0"], "steps 0 must be a whole number from 1"),
    (["--rys", "1,3", "--preset", "qwen3-4b-mmlu-pro"], "rys and preset qwen3-4b-mmlu-pro both say which layers loop"),
    (["--from-mergekit", "nowhere.yml"], "cannot read mergekit config nowhere.yml: No such file"),
]


@pytest.mark.parametrize(("options", "says"), BAD_SPECS, ids=lambda value: str(value)[:40])
def test_impossible_specs_are_refused(base, tmp_path, options, says):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *options, says=says)


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "two"],
        ["--weights", "telepathy"],
        ["--mode", "spiral"],
        ["--kv", "own"],
        ["--decode", "some"],
        ["--rule", "martian\nrule"],
        ["--nonsense"],
        ["--damping", "x"],
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2(base, tmp_path, options):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *SPEC, *options, says="Usage:", status=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--span", "1:4"], "Error: the loop spec has no steps; give one, such as --steps 4"),
        (["--steps", "2"], "Error: the loop spec has no span; give one, such as --span 12:20"),
        ([], "Error: the loop spec has no span"),
        ([], "or say it in another way: --path, --rys or --from-mergekit"),
        ([*SPEC, "--rule", "eular"], "Did you mean 'euler'?"),
        ([*SPEC, "--kv", "per-step"], "Did you mean 'per_step'?"),
        ([*SPEC, "--weights", "hard-link"], "Did you mean 'hardlink'?"),
        ([*SPEC, "--decode", "byepass"], "Did you mean 'bypass'?"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_usage_says_what_to_write(base, tmp_path, options, says):
    assert_refused(tmp_path, "convert", base, tmp_path / "out", *options, says=says, status=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("span: 1:4\n", "the loop spec has no steps"),
        ("span: 1:4\nsteps: 3\nstep_size: 0.5\n", "unknown key 'step_size'"),
        ("just a string", "is not a mapping"),
        ("span: [1, 4\n", "is not YAML"),
        ("span: [1, 2, 3]\nsteps: 2\n", "span [1, 2, 3] is not a pair"),
        ("span: 1:4\nsteps: yes\n", "steps True must be"),
        ("span: 1:4\nsteps: 3\nmode: spiral\n", "mode 'spiral' must be one of block, layer"),
        ("span: 1:4\nsteps: 3\nkv: own\n", "kv 'own' must be one of shared, per_step, reference"),
        ("span: 1:4\nsteps: 3\nkv: [shared]\n", "kv ['shared'] must be one of"),
        ("span: 1:4\nsteps: 3\ndecode: some\n", "decode 'some' must be one of full, bypass, first_n"),
        ('span: 1:4\nsteps: 3\nrule: "martian\\nrule"\n', "rule 'martian\\nrule' must be one of"),
        ("path: 0-3,9-5\n", "has '9-5', which goes backwards"),
        ("path: {0: 3}\n", "path {0: 3} is no list of layers"),
        ("path: [0-3, 2]\nspan: 1:2\n", "span and path both say which layers loop"),
        ("rys: 3\n", "rys 3 is not I,J"),
        ("from_mergekit: [a]\n", "from_mergekit ['a'] is not a file"),
        ("span: 1:4\nstep: 3\n", "unknown key 'step' in the loop spec; did you mean 'steps'?"),
        ("span: 1:4\nsteps: 3\nsteps: 4\n", "key 'steps' is there twice"),
        ("path: [0, 5]\n", "path [0, 5] may be one run or two layers"),
        ("path: 0-3,2-5\nsteps: 2\n", "steps 2 and path were given"),
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


def test_norwegian_is_not_read_as_false(base, tmp_path):
    (base / "README.md").write_text("---\nlanguage: [en, no]\nlicense: mit\n---\n# Base\n")
    root = loopexport.convert(str(base), tmp_path / "out", span=(1, 4), steps=3).root
    assert read_metadata((root / "README.md").read_text())["language"] == ["en", "no"]
