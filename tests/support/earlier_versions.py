"""Exports of earlier versions, kept in `tests/data`: their code, a tiny export, and the logits that it computed.

    PYTHONPATH=tests python -m support.earlier_versions NAME

stores the installed version as NAME before a release; `tests/data/README.md` says what to do then.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import loopexport
from support.commands import sha256
from support.paths import ROOT

DATA = ROOT / "tests" / "data"
NAMES = ("two-files", "nine-files")  # the oldest first, as in `EARLIER_SETS`

VOCAB, PROMPT, LENGTH = 64, 5, 9
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOOP = {"span": "1:3", "steps": 3, "anchor": 0.25, "kv": "per_step"}


def code_of(name: str) -> dict[str, Path]:
    """The code files of a version, by name."""
    return {path.name: path for path in sorted((DATA / f"templates-{name}").glob("*.py"))}


def earlier_export(name: str, out: Path) -> Path:
    """Put the export of a version together at `out`, as that version wrote it."""
    shutil.copytree(DATA / "exports" / name, out)
    for file, path in code_of(name).items():
        shutil.copyfile(path, out / file)
    return out


def recorded_logits(name: str) -> dict[str, torch.Tensor]:
    """The logits that a version's export computed when it was stored; see `compute_logits`."""
    values = json.loads((DATA / "exports" / f"{name}.json").read_text())
    return {key: torch.tensor(each) for key, each in values.items()}


def compute_logits(root: Path) -> dict[str, torch.Tensor]:
    """Logits of the last token, `(vocab,)`: of a full forward, and of a prompt and decode steps with a cache."""
    model = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True).eval()
    tokens = torch.arange(7, 7 + LENGTH)[None] * 5 % VOCAB
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits[0, -1]
        output = model(tokens[:, :PROMPT], use_cache=True)
        for place in range(PROMPT, LENGTH):
            output = model(tokens[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
    return {"full": full, "decode": output.logits[0, -1]}


def store(name: str) -> None:
    """Store the installed version: its code, a tiny export, and its logits."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "tiny-llama", Path(folder) / f"looped_{name.replace('-', '_')}"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).save_pretrained(base)
        loopexport.convert(str(base), out, **LOOP)
        logits = {key: [round(each, 6) for each in values.tolist()] for key, values in compute_logits(out).items()}
        code = DATA / f"templates-{name}"
        code.mkdir(exist_ok=True)
        for path in out.glob("*.py"):
            path.replace(code / path.name)
        shutil.move(out, DATA / "exports" / name)
        (DATA / "exports" / f"{name}.json").write_text(json.dumps(logits) + "\n")


if __name__ == "__main__":
    store(sys.argv[1])
    print(
        "Add to EARLIER_SETS:",
        json.dumps({file: sha256(path) for file, path in code_of(sys.argv[1]).items()}, indent=4),
    )
