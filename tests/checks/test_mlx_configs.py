"""A config of transformers 5 is read in MLX as transformers reads it, or refused when mlx-lm loads the export.

Needs an environment with mlx-lm, as `test_mlx.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import loopexport
from loopexport.checks.mlx import relative_difference, run_mlx
from loopexport.checks.probe import CHUNKS
from support.damage import edit_config
from support.mlx_configs import NOT_READ, READ
from support.tiny import FAMILIES, SPAN, save_tiny, tiny_tokens
from support.walk_configs import save_tiny_family

PYTHON = os.environ.get("LOOPEXPORT_MLX", "")
if not PYTHON:
    pytest.skip("needs mlx-lm; `make test-mlx` makes an environment with it", allow_module_level=True)

TOLERANCE = 1e-5  # of the logits' scale, in fp32
TOKENS = tiny_tokens(2, sum(CHUNKS))


def made(family: str, folder: Path, **fields) -> Path:
    """An export of a tiny base with these fields of the config, as transformers 5 writes it."""
    save = save_tiny if family in FAMILIES else save_tiny_family
    base = save(family, folder / "base", **fields)
    kv = "per_step" if family == "qwen3_next" else "shared"
    return loopexport.convert(str(base), folder / "looped", span=SPAN, steps=3, kv=kv, mlx=True).root


def logits_of(export: Path):
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def run_of(export: Path, **fields) -> dict:
    return {"model": str(export), "tokens": TOKENS.tolist(), "chunks": CHUNKS, "fields": fields}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """For each of `READ`, what MLX computed, and the logits of transformers."""
    exports = [made(family, tmp_path_factory.mktemp(family), **fields) for family, fields in READ]
    ran = run_mlx([run_of(export) for export in exports], python=PYTHON)
    return [(each, logits_of(export)) for each, export in zip(ran, exports, strict=True)]


@pytest.mark.parametrize("number", range(len(READ)), ids=[f"{family}-{'-'.join(each)}" for family, each in READ])
def test_a_config_is_read_as_transformers_reads_it(read, number):
    ran, logits = read[number]
    assert not ran.error
    assert relative_difference(ran.full, logits) <= TOLERANCE
    assert relative_difference(ran.cached, logits) <= TOLERANCE


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """For each of `NOT_READ`, the error of mlx-lm with these fields in the config of an export of a llama."""
    export = made("llama", tmp_path_factory.mktemp("llama"))
    edit_config(export, rope_parameters=None)
    runs = [run_of(export, model_type=f"looped_{family}", **fields) for family, fields, _ in NOT_READ]
    return [each.error for each in run_mlx(runs, python=PYTHON)]


@pytest.mark.parametrize("number", range(len(NOT_READ)), ids=[message for _, _, message in NOT_READ])
def test_what_mlx_lm_does_not_read_is_refused_at_load(refused, number):
    assert refused[number].startswith("cannot run this looped model on MLX: ")
    assert NOT_READ[number][2] in refused[number]
