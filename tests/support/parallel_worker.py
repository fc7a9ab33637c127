"""One of several processes that share each model: load the models, run them, save the results of the first process.

    torchrun --nproc-per-node 2 tests/support/parallel_worker.py JOBS.json OUT

A job has `name`, `directory`, `how` (a parallelism: tp, ep, pp or fsdp) and `options` for `from_pretrained`. The logits
of a full forward and of cached decoding go to `OUT/name.pt`; with fsdp, the loss and the gradients of a training step.
If the model is refused, the reason goes to `OUT/name.txt`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

TOKENS = torch.arange(3, 21).reshape(2, 9)
PREFILL = 5


def run(job: dict, out: Path) -> None:
    """Run one job."""
    model = load(job["directory"], job["how"], job["options"])
    loop, layers = vars(model.model)["_loop"], model.model.layers
    try:
        loop.begin(layers, (), {}).visit(layers)  # a forward that one process refuses leaves the others waiting
    except ValueError as refusal:
        (out / f"{job['name']}.txt").write_text(str(refusal))
        return
    if job["how"] == "fsdp":
        result = trained(sharded(model))
    else:
        result = {"full": full(model), "decoded": decoded(model), "held": held(model)}
    if torch.distributed.get_rank() == 0:
        torch.save(result, out / f"{job['name']}.pt")


def load(directory: str, how: str | None, options: dict):
    """Load the model, or this process's part of it."""
    parallel: dict = {}
    if how == "tp":
        parallel = {"tp_plan": "auto"}
    elif how in ("ep", "pp"):
        from transformers.distributed import DistributedConfig

        sizes = {"ep": {"tp_size": 2, "ep_size": 2}, "pp": {"pp_size": 2}}[how]
        parallel = {"distributed_config": DistributedConfig(**sizes)}
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **parallel, **options).eval()


def sharded(model):
    """The model in training, with each decoder layer sharded by FSDP2, by the usual loop over the layer list."""
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model.train()


def trained(model) -> dict:
    """The loss and the gradients, by parameter, of one training step."""
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{
            name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for name, p in model.named_parameters()
        },
    }


@torch.no_grad()
def full(model) -> torch.Tensor:
    """Logits of a forward without a cache, `(batch, seq, vocab)`."""
    return model(TOKENS, use_cache=False).logits


@torch.no_grad()
def decoded(model) -> torch.Tensor:
    """Logits of a prefill and of decode steps, `(batch, seq, vocab)`."""
    output = model(TOKENS[:, :PREFILL], use_cache=True)
    parts = [output.logits]
    for position in range(PREFILL, TOKENS.shape[1]):
        cache = getattr(output, "cache", None) or output.past_key_values  # its name before transformers 5.24
        output = model(TOKENS[:, position : position + 1], past_key_values=cache, use_cache=True)
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def held(model) -> int:
    """Number of parameter elements that this process holds."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())


def main() -> None:
    """Run all jobs, in order."""
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job, Path(sys.argv[2]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
