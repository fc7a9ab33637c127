"""`benchmarks/cuda.py` rehearsed on the CPU: a thin slice of each part, and that damage makes it fail.

And what `benchmarks/bench_vllm.py` and `bench_mlx.py` make of the times of engines, which doubles set.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = [sys.executable, str(BENCHMARKS / "cuda.py")]


@pytest.fixture(autouse=True)
def parts_on_path(monkeypatch):
    """Let tests import `cuda_parts`; for no longer, because there `cuda.py` hides packages of that name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny dense base and its loop, with what torch computes in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from cuda_parts.torch_exactness import Pair

        return Pair("qwen3", tmp_path_factory.mktemp("pair"), policies=("shared",))


def run_parts(tmp_path, *codes, seconds=30.0, limit=5.0):
    """The results of parts that run Python code."""
    from cuda_parts.runner import Part, run_all

    parts = [Part(f"part{number}", limit, True, lambda scale: iter(())) for number in range(len(codes))]
    code_of = dict(zip((part.name for part in parts), codes, strict=True))
    return parts, list(run_all(parts, lambda part: [sys.executable, "-c", code_of[part.name]], seconds))


def test_results_of_a_part_are_kept_however_it_ends(tmp_path):
    line = """print('noise'); print('{"case": "one", "status": "passed"}', flush=True); """
    parts, results = run_parts(
        tmp_path,
        line,
        line + "raise SystemExit('broken')",
        line + "import subprocess; subprocess.run(['sleep', '60'])",
        limit=1.5,
    )
    assert [(each["part"], each["status"]) for each in results] == [
        ("part0", "passed"),
        ("part1", "passed"),
        ("part1", "error"),
        ("part2", "passed"),
        ("part2", "timeout"),
    ]
    assert "broken" in results[2]["error"]
    from cuda_parts.runner import is_failure, table

    assert [is_failure(each, parts) for each in results] == [False, False, True, False, True]
    assert not is_failure(results[-1], [replace(part, proves=False) for part in parts])
    assert table(results).splitlines()[1] == "part1  1 passed, 1 error"


def test_a_part_without_time_is_skipped(tmp_path):
    _, results = run_parts(tmp_path, "pass", seconds=0.0)
    assert [each["status"] for each in results] == ["skipped"]


def test_jobs_side_by_side_report_crashes_too():
    import os

    from cuda_parts.results import skipped
    from cuda_parts.workers import side_by_side

    def crash():
        yield {"case": "first", **skipped("")}
        os._exit(3)

    def fail():
        yield {"case": "first", **skipped("")}
        raise ValueError("no")

    results = list(side_by_side({"a": crash, "b": fail, "c": lambda: iter(())}, 2))
    found = sorted((each["case"], each["status"]) for each in results)
    assert found == [("a", "error"), ("a first", "skipped"), ("b", "error"), ("b first", "skipped")]


def test_command_prints_lines_and_a_table(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [*SCRIPT, "--rehearse", "--parts", "machine", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[:-1] == out.read_text().splitlines()
    assert {json.loads(line)["status"] for line in lines[:-1]} == {"measured"}
    assert lines[-1] == "machine  4 measured"


def test_command_refuses_an_unknown_part():
    done = subprocess.run([*SCRIPT, "--parts", "torch,nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown part 'nothing'; choose from machine, torch" in done.stderr


def test_loop_is_as_exact_as_its_base(pair):
    from cuda_parts.scale import REHEARSAL
    from cuda_parts.torch_exactness import cases_of

    for dtype in ("fp32", "bf16"):
        (result,) = cases_of(pair, dtype, "sdpa", REHEARSAL)
        assert result["status"] == "passed", result
        assert result["base"] > 0


@pytest.mark.parametrize("damage", ["weight", "policy", "nan"])
def test_damaged_loop_fails(pair, damage, monkeypatch):
    from cuda_parts import torch_exactness
    from cuda_parts.scale import REHEARSAL

    load = torch_exactness.load

    def damaged(root, *options):
        model = load(root, *options)
        weight = model.model.layers[2].mlp.down_proj.weight
        if root == pair.looped and damage == "weight":
            weight.data[0, 0] += 1
        elif root == pair.looped and damage == "nan":
            weight.data[0, 0] = torch.nan
        return model

    monkeypatch.setattr(torch_exactness, "load", damaged)
    if damage == "policy":
        monkeypatch.setattr(
            torch_exactness, "use_policy", lambda model, policy: setattr(model.config, "loop_kv", "per_step")
        )
    (result,) = torch_exactness.cases_of(pair, "fp32", "sdpa", REHEARSAL)
    assert result["status"] == "failed", result


def test_static_cache_is_as_exact(pair):
    from cuda_parts.torch_exactness import load
    from cuda_parts.torch_graphs import plain_step, static_cache, stepped_logits

    model = load(pair.looped, "fp32", "cpu", "sdpa")
    references = pair.looped_logits["shared"]
    assert pair.worst(model, references, False, static_cache) < 1e-5
    whole = pair.scenarios[0]
    ours = stepped_logits(model, replace(whole, chunks=(20, *[1] * 12)), plain_step)
    from cuda_parts.torch_exactness import error

    assert error(ours, references[whole.name], whole, typical=False) < 1e-5


def test_speed_of_torch_is_measured(monkeypatch):
    from cuda_parts import speed
    from cuda_parts.scale import REHEARSAL

    results = list(speed.torch_speed("Qwen3-0.6B", 1e9, REHEARSAL))
    assert [each["status"] for each in results] == ["measured"] * 2, results
    assert all(each["overhead"] > 0 for each in results)
    base = speed.random_base("Moonlight-16B-A3B", "cpu", "fp32", real=False)
    looped = speed.looped_over(base)
    assert looped.lm_head.weight.data_ptr() == base.lm_head.weight.data_ptr(), "the weights are not shared"
    experts = [each.nbytes for each in base.model.layers[3].mlp.experts.parameters()]
    everything = sum(each.nbytes for each in base.model.layers.parameters())
    assert speed.bytes_read(looped, 0) > everything - 4 * sum(experts)
    assert speed.bytes_read(looped, 10) > speed.bytes_read(looped, 0)


def test_vllm_is_compared_with_the_base_and_with_its_own_class(monkeypatch, tmp_path, capsys):
    import bench_vllm

    for name in bench_vllm.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is restored
    monkeypatch.setattr(bench_vllm, "clock", lambda: lambda: clock.now)
    clock = SimpleNamespace(now=0.0)

    class Engine:
        """Takes a second for each layer and new token; loops of 2 of 4 layers take a tenth longer."""

        def __init__(self, hf_overrides=None, model_impl="vllm", **arguments):
            assert not arguments["enable_prefix_caching"]
            loop = hf_overrides or {"loop_steps": 1}
            layers = 4 + 2 * (loop["loop_steps"] - 1)
            self.seconds = layers * (1.1 if loop["loop_steps"] > 1 else 1) * (1.25 if model_impl != "vllm" else 1)

        def generate(self, prompts, sampling, use_tqdm):
            clock.now += self.seconds * len(prompts) * sampling.max_tokens

    vllm = SimpleNamespace(LLM=Engine, SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (tmp_path / "config.json").write_text(json.dumps({"loop_span": [1, 3], "num_hidden_layers": 4}))
    command = ["bench_vllm.py", str(tmp_path), "--loops", "shared:2,per_step:4", "--native", "base", "--tiny"]
    monkeypatch.setattr(sys, "argv", command)
    bench_vllm.main()
    result = json.loads(capsys.readouterr().out)
    loads = ("prompt", "one request", "64 requests")
    for name, wanted in (("shared K=2", 1.1), ("per_step K=4", 1.1), ("base again", 1.0)):
        assert result["overhead"][name] == pytest.approx(dict.fromkeys(loads, wanted))
    assert result["transformers backend / own class"] == pytest.approx(dict.fromkeys(loads, 1.25))


def test_mlx_is_compared_with_the_base(monkeypatch, tmp_path, capsys):
    import bench_mlx

    def load(directory, loop_steps, loop_kv="shared"):
        """A model that takes a second for each layer evaluation; loops of 2 of 4 layers take a tenth longer."""
        return (4 + 2 * (loop_steps - 1)) * (1.1 if loop_steps > 1 else 1)

    monkeypatch.setattr(bench_mlx, "load", load)
    monkeypatch.setattr(bench_mlx, "measure", lambda seconds, prompt, new: {"prompt": seconds, "decode": seconds * new})
    (tmp_path / "config.json").write_text(json.dumps({"loop_span": [1, 3], "num_hidden_layers": 4}))
    monkeypatch.setattr(sys, "argv", ["bench_mlx.py", str(tmp_path), "--loops", "shared:2,per_step:4"])
    bench_mlx.main()
    ideal, slower = (dict.fromkeys(("prompt", "decode"), factor) for factor in (1.0, 1.1))
    assert json.loads(capsys.readouterr().out) == {"base again": ideal, "shared:2": slower, "per_step:4": slower}
