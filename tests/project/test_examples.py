"""The examples as a newcomer meets them: each is listed, and its usage line is one that it takes."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.paths import ROOT

TABLE = ROOT / "examples" / "README.md"
SCRIPTS = sorted(path for suffix in ("py", "sh") for path in (ROOT / "examples").rglob(f"*.{suffix}"))
NAMES = [path.relative_to(ROOT / "examples").as_posix() for path in SCRIPTS]

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)


def usage_of(path: Path) -> list[str]:
    """The words of a script's usage line, from the script's own name on."""
    lines = re.findall(r"^#? *((?:python )?examples/\S+ .*)$", path.read_text(), re.MULTILINE)
    assert len(lines) == 1, f"{path} has {len(lines)} usage lines"
    words = shlex.split(lines[0], comments=True)
    return words[1:] if words[0] == "python" else words


def is_refused(path: Path, words: list[str]) -> bool:
    """Whether the check of its arguments ends a Python script."""
    checks = [
        node.test
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.body[0]) == "sys.exit(__doc__)"
    ]
    assert len(checks) == 1, f"{path} does not print its usage where the arguments are wrong"
    return eval(ast.unparse(checks[0]), {"sys": SimpleNamespace(argv=words), "len": len})


def test_every_example_is_in_the_table():
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", TABLE.read_text(), re.MULTILINE)
    assert all(text == link for text, link in listed)
    assert sorted(text for text, _ in listed) == sorted(NAMES)


@each_script
def test_usage_line_is_one_that_the_script_takes(path):
    words = usage_of(path)
    assert (ROOT / words[0]).samefile(path), "it has to work from the project's root"
    if path.suffix == ".py":
        assert not is_refused(path, words)
        assert is_refused(path, words[:1])
        return
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run([path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert f"    {words[0]} " in done.stderr


@each_script
def test_usage_names_files_that_the_demo_makes(path):
    made = {"demo", "demo/SmolLM2-135M-Instruct", "demo/SmolLM2-135M-Instruct-looped"}
    inputs = [word for word in usage_of(path)[1:2] if word.startswith("demo")]
    assert set(inputs) <= made
