"""A looped model that is split among two processes gives what it gives in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from support import parallel_worker
from support.compare import assert_close, assert_differs

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
WORKER = Path(parallel_worker.__file__)
FROZEN = {"loop_mode": "layer", "loop_frozen_routing": True, "loop_norm_interpolation": True}

# By name: family, parallelism, options of `from_pretrained`. The tiny models have six layers, and span 1:4.
JOBS: dict[str, tuple[str, str, dict]] = {
    "llama": ("llama", "tp", {}),
    "qwen3 per step": ("qwen3", "tp", {"loop_kv": "per_step"}),
    "qwen3_moe frozen": ("qwen3_moe", "tp", FROZEN),
    "gemma3_text reference": ("gemma3_text", "tp", {"loop_kv": "reference"}),
    "deepseek_v3 frozen": ("deepseek_v3", "tp", FROZEN),
}
if TRANSFORMERS_5:
    JOBS |= {
        "qwen3_moe experts": ("qwen3_moe", "ep", FROZEN),
        "deepseek_v3 experts": ("deepseek_v3", "ep", {}),
        "llama pipeline, layers": ("llama", "pp", {"loop_mode": "layer"}),
        "llama pipeline, per step": ("llama", "pp", {"loop_mode": "layer", "loop_kv": "per_step"}),
        "llama pipeline, span in a stage": ("llama", "pp", {"loop_span": [[0, 2], [3, 6]]}),
        "qwen3_moe pipeline": ("qwen3_moe", "pp", {"loop_span": [3, 6], "loop_frozen_routing": True}),
    }
TRAINING: dict[str, tuple[str, str, dict]] = {
    "llama fsdp": ("llama", "fsdp", {}),
    "llama fsdp, layers, per step": ("llama", "fsdp", {"loop_mode": "layer", "loop_kv": "per_step"}),
}
# One start of two processes serves all tests.
pytestmark = pytest.mark.matrix

CROSSING = ("llama", "pp", {"loop_span": [2, 5]})


@pytest.fixture(scope="module")
def results(export_dir, tmp_path_factory):
    """The directory of what two processes made of all jobs."""
    directory = tmp_path_factory.mktemp("parallel")
    jobs = {**JOBS, **TRAINING, **({"crossing": CROSSING} if TRANSFORMERS_5 else {})}
    described = [
        {"name": name, "directory": str(export_dir(family)), "how": how, "options": options}
        for name, (family, how, options) in jobs.items()
    ]
    for job in described:  # transformers 4 may read an export's code in one process while another one still copies it
        parallel_worker.load(job["directory"], None, {})
    (directory / "jobs.json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(directory / "jobs.json"), str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(name, results, export_dir):
    family, how, options = JOBS[name]
    ours = torch.load(results / f"{name}.pt")
    model = parallel_worker.load(str(export_dir(family)), None, options)
    assert ours["held"] < 0.9 * parallel_worker.held(model), "nothing was split"
    assert_close(ours["full"], parallel_worker.full(model))
    if how != "pp":  # the native pipeline's later stages count positions by the cache of layer 0, which is not theirs
        assert_close(ours["decoded"], parallel_worker.decoded(model))
    model.config.loop_steps = 1
    assert_differs(ours["full"], parallel_worker.full(model))


@pytest.mark.parametrize("name", TRAINING)
def test_two_processes_train_as_one(name, results, export_dir):
    family, _, options = TRAINING[name]
    ours, model = torch.load(results / f"{name}.pt"), parallel_worker.load(str(export_dir(family)), None, options)
    theirs = parallel_worker.trained(model.train())
    assert list(ours) == list(theirs)
    for parameter, gradient in theirs.items():
        assert_close(ours[parameter], gradient, 1e-4)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="pipelines came with transformers 5")
def test_a_span_that_crosses_the_stages_of_a_pipeline_is_refused(results):
    assert (
        (results / "crossing.txt").read_text().startswith("layers 2 to 4 loop together and are cut by pipeline stages")
    )
