"""The layout: imports between rooms go one way, modules are short, and the map names every one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import loopexport
from loopexport import templates
from support.paths import ROOT

PACKAGE = ROOT / "loopexport"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "templates" not in path.relative_to(PACKAGE).parts)
TEMPLATES = sorted((ROOT / "templates").glob("*.py"))
# What each room may import beside itself. `templates` is for all of them.
BELOW = {"errors", "_version", "_keywords"}
FILES = BELOW | {"choices"}
BASE = FILES | {"files"}
LOOP = BASE | {"base"}
EXPORT = LOOP | {"loop"}
ROOMS = {
    "errors": set(),
    "_version": set(),
    "_keywords": {"errors"},
    "choices": BELOW,
    "files": FILES,
    "base": BASE,
    "loop": LOOP,
    "export": EXPORT,
    "hub": EXPORT | {"export"},
    "onnx": EXPORT | {"export"},
    "evaluation": EXPORT | {"export"},
    "checks": EXPORT | {"export", "hub", "onnx"},
    "cli": EXPORT | {"export", "hub", "onnx", "evaluation", "checks"},
    "__main__": {"cli"},
}
ONNX_ROOMS = {
    "trace": set(),
    "runtime": set(),
    "weights": {"quantise"},
    "quantise": {"trace", "runtime", "weights"},
    "graph": {"trace", "runtime", "limits", "quantise", "weights"},
    "limits": set(),
    "data_files": set(),
    "plan": {"graph", "trace", "runtime", "limits", "quantise", "data_files", "build"},  # `plan.apply()` calls `build`
    "check": {"graph", "trace", "runtime", "limits", "quantise", "plan"},
    "measure": {"runtime", "quantise", "plan", "check"},
    "build": {
        "graph", "trace", "runtime", "limits", "quantise", "weights", "data_files", "plan", "check", "measure"
    },
}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Full names of what a module of the package imports of it, inside functions too, but for annotations."""
    package = ("loopexport", *path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in _run_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "loopexport"}


def _run_nodes(tree: ast.AST):
    """All nodes but those below `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_nodes(node)


def room_of(name: str, depth: int = 1) -> str:
    """The room of a full name: `base` for `loopexport.base.checkpoint.read_json`."""
    parts = name.split(".")
    return parts[depth] if len(parts) > depth else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    place = path.relative_to(PACKAGE).with_suffix("").parts
    imported = imports_of(path)
    if place[0] == "__init__":
        assert imported == {"loopexport._version.__version__"}
        return
    allowed = ROOMS[place[0]] | {place[0], "templates"}
    rooms = {room_of(name) for name in imported if room_of(name) not in loopexport.__all__}
    assert rooms <= allowed, f"{'/'.join(place)} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.is_relative_to(PACKAGE / "onnx")], ids=lambda path: path.stem
)
def test_imports_inside_onnx_go_one_way(path):
    place = path.relative_to(PACKAGE / "onnx").with_suffix("").parts
    if place[0] == "__init__":
        return
    inside = {name for name in imports_of(path) if name.startswith("loopexport.onnx.")}
    rooms = {room_of(name, 2) for name in inside}
    allowed = ONNX_ROOMS[place[0]] | {place[0]}
    assert rooms <= allowed, f"onnx/{'/'.join(place)} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize("path", [*MODULES, *TEMPLATES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_test_file_is_longer_than_400_lines_and_none_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        if "data" in path.relative_to(ROOT / "tests").parts:
            continue
        assert len(path.read_text().splitlines()) <= 400, path
        modules = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [name for name in modules if name.split(".")[-1].startswith("test_") or name.startswith("tests")], (
            path
        )


def test_no_folder_or_module_has_the_name_of_a_public_one():
    below = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not below & set(loopexport.__all__)


def test_templates_import_nothing_of_loopexport_and_the_model_imports_each_of_them():
    direct = set()
    for path in TEMPLATES:
        if path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert not (node.level and node.module is None), (
                    f"{path.name}: transformers finds `from .x import` only"
                )
                names = [node.module or ""] if not node.level else []
                if node.level and path.name == "modeling_looped.py":
                    direct.add(f"{node.module}.py")
            assert not [name for name in names if name.split(".")[0] == "loopexport"], path.name
    # transformers 4 copies what the model's file imports itself, and not what those files import
    assert direct == set(templates.FILES) - {"modeling_looped.py"}


def test_the_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES]
    names += [f"templates/{path.stem}" for path in TEMPLATES]
    missing = [name for name in names if not name.endswith("__init__") and f"`{name}`" not in text]
    assert not missing, f"CONTRIBUTING.md does not name {missing}"
