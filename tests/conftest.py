"""Shared fixtures: tiny bases and exports, made once per session, and models loaded as users load them."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import runpy
import shutil
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may use the network; tests of the Hub set their own endpoint
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers copies a model's code to this folder. If processes shared it, one could import another's partial copy.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="loopexport-modules-")

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import loopexport
from support.commands import run
from support.paths import EXAMPLES
from support.recording import Recorder, largest_difference_of_the_test  # noqa: F401
from support.records import RECORDS
from support.tiny import SPAN, save_tiny

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)  # the models are too small for more
logging.disable_progress_bar()
gc.freeze()  # what is imported stays: the collector need not look at it again


def pytest_addoption(parser):
    """`--record NAME` runs a long walk; see `support/records.py`."""
    parser.addoption("--record", choices=sorted(RECORDS), help="run a long walk and write its record")
    parser.addoption("--with-slow", action="store_true", help="with --record: run the slow cells too")


def pytest_configure(config):
    """Record a walk where that is asked for."""
    if config.option.record:
        config.pluginmanager.register(Recorder(config), "recorder")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give whole files to workers, long ones first."""
    from support.scheduling import ByFile

    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    """In a worker, long files come first."""
    if hasattr(config, "workerinput"):
        from support.scheduling import place_of

        items.sort(key=lambda item: place_of(item.nodeid))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """`tiny_base(family)`: directory of the family's tiny base checkpoint."""
    made = {}

    def make(family="llama", **overrides):
        key = (family, *sorted(overrides.items()))
        if key not in made:
            made[key] = save_tiny(family, tmp_path_factory.mktemp("base") / family, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def export_dir(tiny_base, tmp_path_factory):
    """`export_dir(family, **spec)`: directory of an export of the family's tiny base."""
    made = {}

    def make(family="llama", **spec):
        spec = {**({} if "path" in spec else {"span": SPAN, "steps": 3}), **spec}
        key = (family, repr(sorted(spec.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("export") / family
            made[key] = loopexport.convert(str(tiny_base(family)), out, weights="copy", **spec).root
        return made[key]

    return make


@pytest.fixture
def looped(export_dir):
    """`looped(family, **spec)`: a looped tiny model, loaded by the auto class."""

    def make(family="llama", **spec):
        return AutoModelForCausalLM.from_pretrained(export_dir(family, **spec), trust_remote_code=True).eval()

    return make


@pytest.fixture
def plain(tiny_base):
    """`plain(family)`: the tiny base, loaded."""

    def make(family="llama"):
        return AutoModelForCausalLM.from_pretrained(tiny_base(family)).eval()

    return make


@pytest.fixture
def example(monkeypatch, tmp_path):
    """`example(name, *arguments)`: run a script of `examples/` in this process; what it printed.

    A new process would import torch for each command. The shell gives the commands of a shell script to a recorder that
    stands for `loopexport`; they run afterwards.
    """

    def run_python(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return printed.getvalue()

    def run_shell(name, *arguments):
        recorder = tmp_path / "recorder" / "loopexport"
        recorder.parent.mkdir()
        recorder.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> '{recorder}.log'\necho >> '{recorder}.log'\n")
        recorder.chmod(0o755)
        path = f"{recorder.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([EXAMPLES / name, *map(str, arguments)], check=True, env={**os.environ, "PATH": path})
        results = [run(*line.split("\0")[:-1]) for line in recorder.with_suffix(".log").read_text().splitlines()]
        assert [each.exit_code for each in results] == [0] * len(results), [each.stderr for each in results]
        return "".join(each.stdout for each in results)

    return lambda name, *arguments: (run_shell if name.endswith(".sh") else run_python)(name, *arguments)
