"""Every family that transformers and mlx-lm have: as exact in MLX as recorded, or refused with a reason.

Needs an environment with mlx-lm, as `test_mlx.py`. `make record-mlx` tries all families.
"""

from __future__ import annotations

import os

import pytest

from loopexport.export.mlx_families import MLX_FAMILIES, MLX_PER_STEP, MLX_REFUSED
from support.mlx_walk import AS_BASE, EXACT, FROZEN, REFUSED, SPARSE, common_families, walk_mlx

PYTHON = os.environ.get("LOOPEXPORT_MLX", "")
if not PYTHON:
    pytest.skip("needs mlx-lm; `make test-mlx` makes an environment with it", allow_module_level=True)

# A family for each outcome: exact, as exact as the base, per_step alone, refused, another base, none to try.
SAMPLE = ("stablelm", "gemma", "falcon_mamba", "nemotron_h", "ernie4_5_moe", "bitnet")
ALL = sorted({*MLX_FAMILIES, *MLX_PER_STEP, *MLX_REFUSED})


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in SAMPLE else (pytest.mark.matrix,)) for each in ALL]
)
def test_every_family_comes_out_as_recorded(family, tmp_path, record_property):
    """`walk_mlx` itself fails where a loop is less exact than the base."""
    outcomes = walk_mlx(family, tmp_path, PYTHON)
    for name, value in {"family": family, **outcomes}.items():
        record_property(name, value)
    good = [name for name, outcome in outcomes.items() if outcome in (EXACT, AS_BASE)]
    whole = {"shared", "per_step", FROZEN} if family in SPARSE else {"shared", "per_step"}
    expected = whole if family in MLX_FAMILIES else {"per_step"} if family in MLX_PER_STEP else set()
    assert set(good) == expected, outcomes
    refusals = [outcome for outcome in outcomes.values() if outcome.startswith(REFUSED)]
    assert family not in MLX_PER_STEP or "set loop_kv to per_step" in refusals[0]


def test_every_common_family_is_in_one_of_the_lists():
    assert common_families(PYTHON) == set(ALL)
    assert len(ALL) == len(MLX_FAMILIES) + len(MLX_PER_STEP) + len(MLX_REFUSED)
