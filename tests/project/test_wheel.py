"""The wheel: built, installed where no checkout is, it converts a base, and the export loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from loopexport import templates
from support.paths import ROOT

LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model(torch.tensor([[5, 6, 7]])).logits.shape[-1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of its files, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("loopexport", "templates"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment with the wheel, which borrows the libraries of this one but not its LoopExport."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin" / "python"
    paths = {"base": str(root), "platbase": str(root)}
    site = sysconfig.get_path("purelib", "venv" if "venv" in sysconfig.get_scheme_names() else None, vars=paths)
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(os.path.join(site, "borrowed.pth"), "w") as file:  # its own directory comes first
        file.write(sysconfig.get_path("purelib") + "\n")
    return python


def run(python, *arguments, cwd):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, [python, *arguments])), capture_output=True, text=True, cwd=cwd, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_what_is_read_at_run_time(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"loopexport/templates/{name}" for name in templates.FILES}
    wanted |= {"loopexport/base/families.json", "loopexport/py.typed"}
    assert wanted <= names
    assert len(templates.FILES) == 26
    assert not [name for name in names if name.startswith(("tests/", "templates/", "docs/"))]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loopexport").rglob("*.py")}
    assert {name for name in modules if "/templates/" not in name} <= names, "a package is not listed in pyproject.toml"


def test_installed_wheel_converts_and_its_export_loads(python, tiny_base, tmp_path):
    where = run(python, "-c", "import loopexport; print(loopexport.__file__)", cwd=tmp_path).strip()
    assert str(ROOT) not in where
    assert where.startswith(str(python.parent.parent))
    command = ["-m", "loopexport", "convert", tiny_base("llama"), tmp_path / "out", "--span", "1:4", "--steps", "3"]
    assert f"Wrote {tmp_path / 'out'}" in run(python, *command, cwd=tmp_path)
    assert run(python, "-c", LOAD, tmp_path / "out", cwd=tmp_path).split() == ["LoopedLlamaForCausalLM", "131"]
