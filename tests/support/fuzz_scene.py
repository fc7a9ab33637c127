"""The scene of the fuzz tests, and the invariants of every command, whatever its input."""

from __future__ import annotations

import json
import os
import shutil
from itertools import count
from pathlib import Path

from safetensors import deserialize

import loopexport
from loopexport.base.checkpoint import CARRIED
from loopexport.export.integrity import check_files
from loopexport.loop.spec import SPEC_KEYS
from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, run
from support.fuzz_inputs import INDEX, TOKENIZER_CONFIG

OURS = {"model_type", "architectures", "auto_map", *(f"loop_{key}" for key in SPEC_KEYS)}


# --- What must hold --------------------------------------------------------------------------------------------------


def contents(root: Path) -> dict[bytes, bytes | None]:
    """Everything below a directory, by path: the bytes of a file, None for a folder."""
    found: dict[bytes, bytes | None] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        found |= {os.path.join(folder, name): None for name in folders}
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[path] = file.read()
    return found


class Scene:
    """A directory with a clean checkpoint and its export; each example works on copies."""

    def __init__(self, root: Path):
        self.root = root
        self.numbers = count()
        self.base = write_sparse_checkpoint(root / "pristine", shards=2, shard_bytes=1000, layers_per_shard=3)
        self.config = json.loads((self.base / "config.json").read_text())
        self.index = json.loads((self.base / INDEX).read_text())
        for name, text in {"tokenizer.json": "{}", "LICENSE": "free", "README.md": "---\nlicense: mit\n---\n"}.items():
            (self.base / name).write_text(text)
        (self.base / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        self.export = loopexport.convert(str(self.base), root / "export", span=(1, 4), steps=3, weights="copy").root
        self.manifest = json.loads((self.export / "loopexport.json").read_text())

    def copy(self, source: Path, changes: dict[str, bytes]) -> Path:
        """Copy `source` to `base` in a new directory, and replace some files; returns the directory."""
        place = self.root / str(next(self.numbers))
        shutil.copytree(source, place / "base")
        for name, content in changes.items():
            (place / "base" / name).write_bytes(content)
        return place

    def try_convert(self, changes: dict[str, bytes], *options, spec=SPEC) -> int:
        """Convert the base with some files replaced, and check the invariants; returns the exit status."""
        place = self.copy(self.base, changes)
        status = assert_sound_convert(place, *spec, *options)
        shutil.rmtree(place)
        return status


def assert_clean(result) -> None:
    """Assert a known exit status, and for status 1 one printable line on stderr."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 1:
        assert result.stderr.startswith("Error: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr[:-1].isprintable(), result.stderr


def assert_sound_convert(place: Path, *options, base="base", out="out") -> int:
    """Convert `place/base`, first as a dry run, and check what holds for every outcome; returns the exit status."""
    before = contents(place)
    command = ["convert", place / base, place / out, *options]
    planned = run(*command, "--dry-run")
    assert_clean(planned)
    assert contents(place) == before
    done = run(*command, "--json")
    assert_clean(done)
    assert done.exit_code == planned.exit_code, (planned.stderr, done.stderr)
    after = contents(place)
    if done.exit_code != 0:
        assert after == before
        return done.exit_code
    inside = os.fsencode(place / out)
    assert {path: content for path, content in after.items() if path != inside and inside + b"/" not in path} == before
    assert_true_export(place / base, place / out)
    return 0


def assert_true_export(base: Path, out: Path) -> None:
    """Assert that an export has the base's config with our fields, its files byte for byte, and a correct manifest."""
    theirs, ours = (json.loads((root / "config.json").read_bytes()) for root in (base, out))
    assert ours["model_type"] == f"looped_{theirs['model_type']}"
    assert set(ours) - {"loop_path"} == set(theirs) | (OURS - {"loop_path"})
    for key in set(theirs) - OURS:
        assert json.dumps(theirs[key]) == json.dumps(ours[key]), key
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (base / path.name).read_bytes()
        deserialize(path.read_bytes())
    for path in base.iterdir():
        if path.is_file() and CARRIED.fullmatch(path.name):
            kept = out / "base" / path.name
            assert (kept if kept.exists() else out / path.name).read_bytes() == path.read_bytes()
    export = loopexport.open_export(out)
    assert [check.detail for check in check_files(export, full=True) if not check.passed] == []
    shown = run("inspect", out)
    assert (shown.exit_code, shown.exception) == (0, None), shown.stderr
