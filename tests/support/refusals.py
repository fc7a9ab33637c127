"""Check commands that must fail: one line on stderr, and no file written."""

from __future__ import annotations

from support.commands import run, tree

INDEX = "model.safetensors.index.json"
AS_ANOTHER_USER = """
import os, sys
import loopexport.cli, loopexport.cli.text, loopexport.export.conversion  # imported while we may still read them
from tqdm import tqdm
if os.geteuid() == 0:
    os.seteuid(65534)
loopexport.cli.main(sys.argv[1:])
"""


def assert_refused(tmp_path, *arguments, says, status=1):
    """Assert that a command fails with one line that contains `says`, and changes nothing in `tmp_path`."""
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


def circle(path):
    """Replace a file by a link to itself."""
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
