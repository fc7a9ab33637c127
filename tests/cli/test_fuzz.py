"""Fuzzing: whatever the input, a command ends in one clear line or in a correct result, and never leaves half a one.

Each test draws a change to something that users or strangers write (config, index, weights headers, side files, loop
spec, names, an export's own files), runs the real command line on a tiny checkpoint that has it, and holds the outcome
to the same invariants. By default a fixed sample is drawn; LOOPEXPORT_FUZZ_EXAMPLES=20000 draws that many at random.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

import loopexport
from loopexport.base.safetensors_header import DTYPE_BITS, read_header
from loopexport.errors import CheckpointError
from loopexport.loop.spec import SPEC_KEYS
from support.commands import SPEC, run
from support.fuzz_inputs import (
    BYTE_NAMES,
    CONFIG_KEYS,
    CONFIG_VALUES,
    INDEX,
    INDEX_VALUES,
    JUNK,
    MERGEKIT_BYTES,
    OPTIONS,
    PLAUSIBLE_SPECS,
    SHARDS,
    SIDE_FILES,
    SPEC_TEXTS,
    TEXTS,
    YAML_BYTES,
    json_bytes,
    mutated,
    mutated_manifest,
    shard_bytes,
)
from support.fuzz_scene import Scene, assert_clean, assert_sound_convert, assert_true_export, contents

EXAMPLES = os.environ.get("LOOPEXPORT_FUZZ_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 50),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def explore(strategy, check):
    """Run `check` on what `strategy` draws."""

    def run_check(drawn):
        check(drawn)

    SETTINGS(given(strategy)(run_check))()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("fuzz"))


def test_any_config_is_refused_clearly_or_exported_whole(scene):
    explore(
        json_bytes(scene.config, CONFIG_KEYS, CONFIG_VALUES),
        lambda config: scene.try_convert({"config.json": config}),
    )


def test_any_index_is_refused_clearly_or_exported_whole(scene):
    weight_map = scene.index["weight_map"]
    maps = mutated(weight_map, TEXTS, INDEX_VALUES).map(
        lambda each: json.dumps({**scene.index, "weight_map": each}).encode()
    )
    explore(
        maps | json_bytes(scene.index, st.just("weight_map") | TEXTS, JUNK),
        lambda index: scene.try_convert({INDEX: index}),
    )


def test_any_weights_file_is_refused_clearly_or_exported_whole(scene):
    explore(
        st.tuples(st.sampled_from([SHARDS[0], "model.safetensors"]), shard_bytes()),
        lambda it: scene.try_convert({it[0]: it[1]}),
    )


def test_weights_header_is_accepted_exactly_when_the_safetensors_library_accepts_it(tmp_path):
    path = tmp_path / "x.safetensors"

    def accepts(function, *arguments) -> bool:
        try:
            function(*arguments)
        except (CheckpointError, SafetensorError):
            return False
        return True

    def check(raw):
        path.write_bytes(raw)
        ours = accepts(read_header, path)
        if ours and any(tensor.dtype not in DTYPE_BITS for tensor in read_header(path).tensors.values()):
            return  # newer than the table, and perhaps than the library
        assert ours == accepts(deserialize, raw)

    explore(shard_bytes(), check)


def test_any_side_files_are_exported_with_the_model(scene):
    def check(files):
        assert scene.try_convert(files) == 0

    explore(SIDE_FILES, check)


def test_any_options_are_refused_clearly_or_exported_whole(scene):
    explore(
        st.tuples(st.sampled_from([[], SPEC, SPEC]), OPTIONS),
        lambda it: scene.try_convert({}, *it[1], spec=it[0]),
    )


def test_any_spec_file_is_refused_clearly_or_exported_whole(scene):
    def check(text):
        place = scene.copy(scene.base, {})
        (place / "loop.yaml").write_bytes(text)
        assert_sound_convert(place, "--spec", place / "loop.yaml")
        shutil.rmtree(place)

    explore(YAML_BYTES, check)


def test_any_mergekit_config_is_refused_clearly_or_exported_whole(scene):
    def check(text):
        place = scene.copy(scene.base, {})
        (place / "merge.yml").write_bytes(text)
        assert_sound_convert(place, "--from-mergekit", place / "merge.yml")
        shutil.rmtree(place)

    explore(MERGEKIT_BYTES, check)


def test_any_keywords_raise_only_our_errors(scene):
    values = JUNK | st.binary(max_size=2) | st.tuples(JUNK, JUNK) | st.sets(st.integers(), max_size=2)
    keywords = st.dictionaries(st.sampled_from([*SPEC_KEYS, "rys", "from_mergekit"]), values, max_size=3)
    number = count()

    def check(keywords):
        out = scene.root / f"keywords-{next(number)}"
        try:
            planned = loopexport.plan_convert(str(scene.base), out, **keywords)
        except loopexport.LoopExportError:
            planned = None
        try:
            loopexport.convert(str(scene.base), out, **keywords)
        except loopexport.LoopExportError:
            assert planned is None
            assert not out.exists()
        else:
            assert planned is not None
            assert_true_export(scene.base, out)
            shutil.rmtree(out)

    explore(
        PLAUSIBLE_SPECS | PLAUSIBLE_SPECS.flatmap(lambda spec: keywords.map(lambda it: spec | it)) | keywords, check
    )


def test_any_names_are_refused_clearly_or_exported_whole(scene):
    """Names of the base, of the output and of a file that lies in the base, as the file system may hold them."""

    def check(names):
        base, out, stray = map(os.fsdecode, names)
        place = scene.copy(scene.base, {})
        if base != "base":
            (place / "base").rename(place / base)
        (place / base / stray).write_bytes(b"{}")
        if base not in (out, ".out"):
            assert_sound_convert(place, *SPEC, base=base, out=out)
        shutil.rmtree(place)

    plain = [(b"base", b"out", b"stray")]
    spots = st.sampled_from([0, 1, 2])
    explore(
        st.tuples(st.sampled_from(plain), spots, BYTE_NAMES).map(
            lambda it: tuple(it[2] if spot == it[1] else name for spot, name in enumerate(it[0]))
        )
        | st.tuples(BYTE_NAMES, BYTE_NAMES, BYTE_NAMES),
        check,
    )


def test_any_words_on_the_command_line_are_refused_clearly_or_work(scene, monkeypatch):
    place = scene.copy(scene.base, {})
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    commands = ["convert", "path", "inspect", "verify", "restore", "rules", "--help"]
    words = SPEC_TEXTS | st.sampled_from(
        ["../base", "out", "~nobody-here/x", "~", ".", "..", "/", "x" * 300, "x/" * 3000, "org/model", "../base/x",
         "--json", "--dry-run", "--files-only", "--full", *SPEC]
    )  # fmt: skip

    def check(words):
        before = contents(place / "base")
        result = run(*words)
        assert_clean(result)
        assert contents(place / "base") == before
        leftovers = contents(place / "here")
        if result.exit_code:
            assert leftovers == {}
        shutil.rmtree(place / "here")
        (place / "here").mkdir()
        os.chdir(place / "here")

    explore(st.tuples(st.sampled_from(commands), st.lists(words, max_size=4)).map(lambda it: [it[0], *it[1]]), check)


def test_any_export_is_refused_clearly_or_read_and_restored_exactly(scene):
    (scene.root / "x").write_bytes(b"not ours")
    config = json.loads((scene.export / "config.json").read_text())
    files = st.one_of(
        st.fixed_dictionaries({"loopexport.json": mutated_manifest(scene.manifest)}),
        st.fixed_dictionaries({"config.json": json_bytes(config, CONFIG_KEYS, CONFIG_VALUES)}),
        st.fixed_dictionaries({"base/config.json": json_bytes(scene.config, CONFIG_KEYS, CONFIG_VALUES)}),
        st.fixed_dictionaries({INDEX: json_bytes(scene.index, TEXTS, JUNK)}),
    )

    def check(changes):
        place = scene.copy(scene.export, changes)
        (place / "x").write_bytes(b"not ours")
        before = contents(place)
        for command in (["inspect"], ["inspect", "--json"], ["verify", "--files-only"], ["verify", "--full"]):
            options = ["--files-only"] if command[-1] == "--full" else []
            result = run(command[0], place / "base", *command[1:], *options)
            if command[0] == "verify" and result.exit_code == 1 and "Error: " not in result.stderr:
                assert "FAIL" in result.stdout
            else:
                assert_clean(result)
        assert contents(place) == before
        verified = result.exit_code == 0
        restored = run("restore", place / "base", place / "out")
        assert_clean(restored)
        assert (restored.exit_code == 0) == verified, restored.stderr
        inside = os.fsencode(place / "out")
        after = contents(place)
        if restored.exit_code:
            assert after == before
        else:
            outside = {path: each for path, each in after.items() if path != inside and inside + b"/" not in path}
            assert outside == before
            ours, theirs = (
                {os.path.relpath(path, os.fsencode(root)): each for path, each in contents(root).items()}
                for root in (place / "out", scene.base)
            )
            assert ours == theirs
        shutil.rmtree(place)

    explore(files, check)
