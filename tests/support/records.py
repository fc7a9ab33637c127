"""Records of long walks, each keyed by a digest of the code that it exercises.

`make record-...` runs a walk and writes its record into `tests/records`: the digest, the versions of what was
installed, and the cells that passed. `tests/project/test_records.py` compares each digest with today's. Comments,
docstrings, messages and layout are not part of a digest, so that a change of words needs no new walk.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from support.paths import RECORDS as DIRECTORY
from support.paths import ROOT

TEMPLATES = ("templates/*.py",)
WITHOUT_VLLM = ("templates/*_looped.py", "templates/looped_[!vm]*.py")  # only vLLM and mlx-lm run the others
TINY = ("tests/support/tiny.py", "tests/support/compare.py", "tests/support/structure.py")
VERIFY = tuple(
    f"loopexport/checks/{name}.py"
    for name in ("verification", "effect", "probe", "replay", "replay_rules", "replay_states")
)
WALKS = tuple(f"tests/support/{name}.py" for name in ("family_walk", "walk_checks", "walk_configs"))
MULTIMODAL = tuple(f"tests/support/multimodal_{name}.py" for name in ("walk", "configs", "inputs", "recipes"))
WALK = (*WALKS, *MULTIMODAL, "loopexport/base/families.py", "loopexport/base/families.json")
ORACLE = (
    *(f"tests/support/{name}.py" for name in ("oracle", "forwards", "routing", "rule_values", "loaded_code")),
    *(f"tests/support/{name}.py" for name in ("watch_experts", "vllm_double", "family_walk", "walk_configs")),
    *(f"tests/templates/test_{name}.py" for name in ("semantics", "rules", "frozen_routing", "routers")),
    *(f"tests/templates/test_{name}.py" for name in ("compile", "experts", "vllm_seam")),
)
VLLM_TESTS = tuple(f"tests/checks/test_vllm{part}.py" for part in ("", "_settings", "_load"))
VLLM = (
    *(f"templates/{name}.py" for name in ("configuration_looped", "modeling_looped")),
    *(f"templates/looped_{name}.py" for name in ("arguments", "body", "decoder", "walk", "rules", "spec", "routing")),
    *(f"templates/looped_{name}.py" for name in ("vllm", "vllm_limits", "vllm_settings")),
    "loopexport/checks/vllm.py", "loopexport/checks/vllm_worker.py", "tests/support/vllm_cases.py",
    "tests/support/vllm_bases.py", "tests/support/walk_configs.py", "tests/support/tiny.py",
    "tests/support/vllm_extras.py", "tests/support/vllm_server.py", "tests/support/quantised.py",
    *VLLM_TESTS,
)  # fmt: skip
MLX_TESTS = ("tests/checks/test_mlx.py", "tests/checks/test_mlx_families.py")
MLX = (
    *(f"templates/{name}.py" for name in ("modeling_looped_mlx", "looped_rules", "looped_spec", "looped_fields")),
    "templates/looped_mlx*.py",
    "loopexport/checks/mlx.py",
    "loopexport/checks/mlx_worker.py",
    *(f"tests/support/mlx_{name}.py" for name in ("bases", "cases", "scenes", "walk")),
    "tests/support/walk_configs.py",
    "tests/support/tiny.py",
    *MLX_TESTS,
)


@dataclass(frozen=True)
class Record:
    """A long walk.

    Attributes:
        tests: files and folders; the walk is their tests of which some cells are marked `matrix`, with all cells.
        exercises: what a change of makes the record stale, as patterns below the checkout.
        packages: what is installed beside torch and transformers and decides about the results.
        whole: whether the walk has all tests of these files, and not only those marked `matrix`.
        keeps_earlier: whether slow cells, which a walk may leave out, stay in the record, marked as earlier ones.
    """

    name: str
    tests: tuple[str, ...]
    exercises: tuple[str, ...]
    packages: tuple[str, ...] = ()
    whole: bool = False
    keeps_earlier: bool = False

    @property
    def command(self) -> str:
        """What runs the walk and writes the record."""
        return f"make record-{self.name.partition('/')[0]}"

    @property
    def file(self) -> Path:
        """Where the record is kept."""
        return DIRECTORY / f"{self.name}.json"

    def digest(self) -> str:
        """The digest of what is exercised, as it is now."""
        return digest_of(self.exercises)

    def read(self) -> dict:
        """The record: `digest`, `versions` and `results`."""
        return json.loads(self.file.read_text())


RECORDS = {
    record.name: record
    for record in (
        Record(
            "oracle", ("tests/templates",), (*TEMPLATES, *TINY, *ORACLE, "tests/support/*.py", "tests/templates/*.py")
        ),
        Record(
            "verify",
            tuple(f"tests/checks/test_{name}.py" for name in ("verify", "mutations", "replay", "states")),
            (
                *WITHOUT_VLLM,
                *TINY,
                *VERIFY,
                "tests/checks/test_mutations.py",
                "tests/checks/test_replay.py",
                "tests/checks/test_states.py",
                "tests/support/export_faults.py",
            ),
        ),
        Record("families", ("tests/base",), (*WITHOUT_VLLM, *WALK, "tests/base/test_families.py")),
        Record("families-oldest", ("tests/base",), (*WITHOUT_VLLM, *WALK, "tests/base/test_families.py")),
        Record(
            "cost",
            ("tests/loop/test_cost.py",),
            ("loopexport/loop/cost.py", "loopexport/base/*.py", *WALK, "tests/loop/test_cost.py"),
        ),
        Record(
            "onnx",
            ("tests/onnx",),
            (
                *(*WITHOUT_VLLM, *TINY, "loopexport/onnx/**/*.py", "tests/onnx/**/*.py"),
                *(*WALK, "tests/support/onnx_walk.py", "tests/support/onnx_graphs.py"),
            ),
            ("onnx", "onnx-ir", "onnxruntime", "onnxscript"),
        ),
        Record("mlx", MLX_TESTS, MLX, whole=True),
        Record("vllm/0.32.0", VLLM_TESTS, VLLM, whole=True, keeps_earlier=True),
    )
}


def digest_of(patterns: tuple[str, ...]) -> str:
    """sha256 of the code of all files that match, with their paths below the checkout."""
    files = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    missing = [pattern for pattern in patterns if not any(ROOT.glob(pattern))]
    assert not missing, f"no file matches {missing}"
    digest = hashlib.sha256()
    for path in files:
        text = path.read_text(encoding="utf-8")
        content = code_of(text) if path.suffix == ".py" else text
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n{content}\n".encode())
    return digest.hexdigest()


def code_of(source: str) -> str:
    """A module's syntax tree as text, without docstrings and without tests that are not part of a matrix."""
    return _text(ast.parse(source))


def _text(value) -> str:
    """A tree as text that is the same on every Python."""
    if _is_words(value):
        return "words"
    if isinstance(value, ast.AST):
        fields = {
            name: each for name, each in ast.iter_fields(value) if each is not None and each != [] and name != "ctx"
        }
        if "body" in fields and isinstance(fields["body"], list):
            fields["body"] = [each for each in fields["body"] if not _is_left_out(each)]
        return f"{type(value).__name__}({','.join(f'{name}={_text(each)}' for name, each in fields.items())})"
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return repr(value)


def _is_words(value) -> bool:
    """Whether a string is for people: it holds a blank. A message may be reworded without a new walk."""
    parts = value.values if isinstance(value, ast.JoinedStr) else [value]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return any(" " in text for text in texts)


def _is_left_out(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, a digest of words too, or a test that is never part of a matrix."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "CODE_DIGEST"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
        marks = " ".join(map(ast.unparse, node.decorator_list))
        return not any(word in marks for word in ("matrix", "by_class", "cells", "as_parameters", "SERVED"))
    return False
