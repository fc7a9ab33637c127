"""`adopt` on random inputs: refused in one line with nothing changed, or an export that is intact."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loopexport
from loopexport.export.integrity import check_files
from support.commands import run
from support.fuzz_inputs import CONFIG_KEYS, CONFIG_VALUES, SIDE_FILES, TEXTS, json_bytes
from support.fuzz_scene import Scene, assert_clean, contents

EXAMPLES = os.environ.get("LOOPEXPORT_FUZZ_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 60),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The scene of the other fuzz tests, whose export lost its records, as after `save_pretrained`."""
    made = Scene(tmp_path_factory.mktemp("fuzz"))
    (made.export / "loopexport.json").unlink()
    shutil.rmtree(made.export / "base")
    return made


def assert_sound(scene, changes, *options):
    """Adopt the export with some files replaced."""
    place = scene.copy(scene.export, changes)
    before = contents(place)
    result = run("adopt", place / "base", *options)
    assert_clean(result)
    if result.exit_code:
        assert contents(place) == before
    else:
        failed = [check for check in check_files(loopexport.open_export(place / "base"), full=True) if not check.passed]
        assert not failed, failed
    shutil.rmtree(place)


def test_any_config_is_refused_clearly_or_adopted_whole(scene):
    looped = json.loads((scene.export / "config.json").read_text())
    names = CONFIG_KEYS | st.sampled_from([name for name in looped if name.startswith("loop_")])

    @SETTINGS
    @given(json_bytes(looped, names, CONFIG_VALUES))
    def check(config):
        assert_sound(scene, {"config.json": config})

    check()


def test_any_side_files_and_any_base_are_refused_clearly_or_adopted_whole(scene):
    @SETTINGS
    @given(SIDE_FILES, TEXTS)
    def check(files, base):
        assert_sound(scene, files, f"--base={base}")

    check()
