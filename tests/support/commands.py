"""Run the command line in this process, and look at the files that it wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from click.testing import CliRunner

from loopexport.cli import main

SPEC = ["--span", "1:4", "--steps", "3"]


def run(*arguments):
    """Run `loopexport` with these arguments; the result has `stdout`, `stderr` and `exit_code`."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def sha256(path: Path) -> str:
    """Digest of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(root: Path) -> dict[str, str]:
    """Digest of every file in a directory, by relative path."""
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


def checks(root, *options):
    """Run `loopexport verify`; each check by name, and the exit status."""
    result = run("verify", root, "--json", *options)
    values = json.loads(result.stdout)
    assert values["passed"] == (result.exit_code == 0)
    return {check["name"]: check for check in values["checks"]}, result.exit_code


def texts(root: Path) -> dict[str, str]:
    """Text of all files in a directory, by name."""
    return {path.name: path.read_text() for path in root.iterdir()}
