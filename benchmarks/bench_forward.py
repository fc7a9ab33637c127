"""Run-time cost of the loop, compared with the base and with mergekit's physically unrolled model.

Overhead is the time relative to the base, divided by the ratio of layer evaluations: 1.00 means that the loop costs
exactly its extra layers. The models take turns; each figure is the median over rounds of the ratio within a round.

    python benchmarks/bench_forward.py MODEL
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import interleaved, ratio, run_process
from transformers import AutoModelForCausalLM

import loopexport

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.unrolled import unrolled

PREFILL_TOKENS, DECODE_TOKENS, ROUNDS = 128, 16, 9
LOAD = (
    "import sys\nfrom transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "model(model.dummy_inputs['input_ids'])"
)


def load(directory: Path):
    """Load a model in fp32 and eval mode."""
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def prefill(model, tokens) -> float:
    """Seconds for one forward over the prompt, `(batch, seq)`."""
    start = time.perf_counter()
    model(tokens)
    return time.perf_counter() - start


@torch.no_grad()
def decode(model, tokens) -> float:
    """Seconds for `DECODE_TOKENS` decode steps after the prompt."""
    cache = model(tokens, use_cache=True).past_key_values
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        model(tokens[:, :1], past_key_values=cache)
    return time.perf_counter() - start


def main(base: Path, work: Path) -> None:
    """Measure and print the results."""
    plain = load(base)
    layers = plain.config.num_hidden_layers
    centre = layers // 2
    span = (centre - 2, centre + 2)
    specs = {
        "shared K=2": {"steps": 2},
        "shared K=6": {"steps": 6},
        "per_step K=6": {"steps": 6, "kv": "per_step"},
        "naive K=2": {"steps": 2, "damping": 1.0, "kv": "per_step"},
    }
    exports = {
        name: loopexport.convert(str(base), work / f"export{number}", span=span, **spec)
        for number, (name, spec) in enumerate(specs.items())
    }
    models = {"base": plain, **{name: load(export.root) for name, export in exports.items()}}
    unrolled(base, work / "unrolled", [(0, span[1]), (span[0], layers)])
    models["unrolled K=2"] = load(work / "unrolled")
    tokens = torch.randint(3, plain.config.vocab_size, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(0))
    print(f"{base.name}: {layers} layers, span {span[0]}:{span[1]}, {torch.get_num_threads()} threads")
    for label, action in (("prefill", prefill), ("decode", decode)):
        actions = {name: partial(action, model, tokens) for name, model in models.items()}
        seconds = interleaved(actions, ROUNDS)
        for name, export in exports.items():
            against_base = ratio(seconds[name], seconds["base"])
            print(
                f"{label} {name}: {against_base:.2f}x the base's time for {export.cost.multiplier:.2f}x its layer "
                f"evaluations, overhead {against_base / export.cost.multiplier:.3f}"
            )
        against_unrolled = ratio(seconds["naive K=2"], seconds["unrolled K=2"])
        print(f"{label} naive K=2: {against_unrolled:.3f}x the time of mergekit's unrolled model")
    models.clear()
    peaks = {
        name: run_process([sys.executable, "-c", LOAD, str(path)]).peak_mib
        for name, path in (("base", base), ("shared K=6", exports["shared K=6"].root), ("unrolled", work / "unrolled"))
    }
    for name in ("shared K=6", "unrolled"):
        print(f"peak memory, loaded and run, {name}: {peaks[name] / peaks['base']:.3f}x the base's")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(Path(sys.argv[1]), Path(directory))
