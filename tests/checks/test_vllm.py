"""An export served by vLLM gives the greedy tokens of transformers, or is refused with the reason.

Needs an environment with vLLM and nothing of LoopExport: `make test-vllm` makes one and names its Python in
LOOPEXPORT_VLLM; `make record-vllm` runs the whole matrix on two releases and writes `tests/records/vllm/`, which the
documentation shows.

What keeps these tests from passing for nothing: fp32, wide weights, prompts longer than a block of the K/V cache and
than a chunk, prefix-cache hits that are counted, tokens that differ from those of the base, and log-probabilities,
since tokens alone do not tell of logits that are scaled. Where rounding would choose the experts, it would decide the
comparison too: prompts are ones at which no router comes near a tie.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import loopexport
from loopexport.checks.vllm import (
    ENGINE,
    Greedy,
    Served,
    answers_of,
    answers_of_transformers,
    first_difference,
    load_with_transformers,
    run_vllm,
)
from loopexport.templates.looped_vllm_limits import VLLM_EXPERTS
from support.paths import ROOT
from support.routing import draw_without_ties
from support.vllm_bases import save_servable
from support.vllm_cases import (
    ALL_SPARSE,
    BASES,
    BLOCK,
    ENGINES,
    ENGINES_PER_PROCESS,
    ENVIRONMENTS,
    FEW,
    LACKING,
    MANY,
    NEW_TOKENS,
    PARALLEL_SERVERS,
    PROMPTS,
    REFERENCE,
    REFUSED,
    SLOW,
    STAGES,
    WHOLE_PROMPTS,
    Case,
    as_parameters,
    draw_prompts,
)
from support.vllm_server import running_server

PYTHON = os.environ.get("LOOPEXPORT_VLLM", "")
if not PYTHON:
    pytest.skip("needs vLLM; `make test-vllm` makes an environment with it", allow_module_level=True)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Variables for the serving processes: nothing of LoopExport can be imported in them."""
    variables = {
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")),
    }
    command = [PYTHON, "-P", "-c", "import loopexport"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'loopexport'" in done.stderr
    return variables


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """`base_of(family, **fields)`: the directory of a base that vLLM can run."""
    made = {}

    def make(family, **fields):
        key = (family, *fields.items())
        if key not in made:
            made[key] = save_servable(family, tmp_path_factory.mktemp("base") / family, **fields)
        return made[key]

    return make


@pytest.fixture(scope="session")
def export_of(base_of, tmp_path_factory):
    """`export_of(case)`: the directory of its export."""

    def make(case):
        out = tmp_path_factory.mktemp("export") / case.family
        return loopexport.convert(str(base_of(case.family)), out, weights="copy", **case.spec).root

    return make


@dataclass(frozen=True)
class Service:
    """A case that was served: its prompts, what transformers answers, and what came of it on vLLM."""

    prompts: list[list[int]]
    theirs: Greedy
    served: Served


def answers_without_ties(export, override):
    """Prompts, and what transformers answers to them with the changed loop fields."""
    model = load_with_transformers(export)
    for name, value in override.items():
        setattr(model.config, name, value)
    return draw_without_ties(model, lambda prompts: answers_of(model, prompts, NEW_TOKENS), draw_prompts)


@pytest.fixture(scope="session")
def serve(request, export_of, environment):
    """`serve(case)`: the `Service`; cases of its group that come next are served with it."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen: list[Case] = [each["case"] for each in parameters if "case" in each]
    made = {}

    def serve_group(first):
        group = first.group
        cases = [case for case in chosen if case.group == group and str(case) not in made]
        cases = cases[cases.index(first) :][:ENGINES_PER_PROCESS]
        exports = [export_of(case) for case in cases]
        asked = [answers_without_ties(export, case.override) for case, export in zip(cases, exports, strict=True)]
        runs = [
            {"engine": {**case.arguments, "model": str(export)}, "calls": [prompts] * 2, "max_tokens": NEW_TOKENS}
            for case, export, (prompts, _) in zip(cases, exports, asked, strict=True)
        ]
        served = run_vllm(runs, python=PYTHON, environment={**environment, **ENVIRONMENTS.get(first.setting, {})})
        made.update({str(case): Service(*both, each) for case, both, each in zip(cases, asked, served, strict=True)})

    def make(case):
        if str(case) not in made:
            serve_group(case)
        return made[str(case)]

    return make


@pytest.fixture
def record(record_property):
    """`record(case, outcome)`: note it for the table of what vLLM serves."""

    def note(case, outcome):
        values = {"family": case.family, "kv": case.spec.get("kv", "shared"), "outcome": outcome}
        values["setting"] = ", ".join([case.setting, *case.engine])
        values["loop"] = " ".join(sorted(case.loop.keys() - {"kv"} | case.override.keys()))
        for name, value in values.items():
            record_property(name, value)

    return note


@pytest.mark.parametrize("case", as_parameters(FEW, MANY, SLOW))
def test_greedy_tokens_are_those_of_transformers(case, serve, base_of, export_of, record):
    service = serve(case)
    prompts, theirs, served = service.prompts, service.theirs, service.served
    lacking = LACKING.get((case.family, case.setting))
    if lacking:
        assert lacking in served.error
        record(case, "refused")
        return
    assert not served.error, served.error
    difference = first_difference(served.answers, prompts, theirs)
    record(case, "differs" if difference else "exact")
    assert not difference
    assert unlike(theirs, base_of(case.family), prompts) >= len(prompts) / 2
    assert not case.override or unlike(theirs, export_of(replace(case, override={})), prompts)
    assert not case.loop.get("frozen_routing") or unlike(theirs, export_of(without_freezing(case)), prompts)
    assert served.cached == [[0] * len(prompts), [_in_whole_blocks(case, prompt) for prompt in prompts]]


def unlike(answers, directory, prompts):
    """How many answers differ from those of another directory."""
    others = answers_of_transformers(directory, prompts, NEW_TOKENS)
    return sum(ours != other for ours, other in zip(answers.tokens, others.tokens, strict=True))


def without_freezing(case):
    """The case with routers that follow each iterate."""
    return replace(case, loop={**case.loop, "frozen_routing": False})


def _in_whole_blocks(case, prompt):
    """How many tokens of a prompt the prefix cache keeps."""
    return (len(prompt) - 1) // BLOCK * BLOCK if case.keeps_prefixes else 0


@pytest.mark.parametrize("case", as_parameters(REFUSED))
def test_what_is_not_exact_is_refused_with_the_reason(case, serve, record):
    served = serve(case).served
    assert not served.answers
    assert case.refusal in (served.log if case.setting == STAGES else served.error)
    record(case, "refused")


def serve_base(base, environment):
    """How vLLM differs from transformers on a base, or what stops it; empty if it does not."""
    prompts, theirs = answers_without_ties(base, {})
    engine = {**Case("").arguments, "model": str(base), "model_impl": "transformers"}
    run = {"engine": engine, "calls": [prompts] * 2, "max_tokens": NEW_TOKENS}
    [served] = run_vllm([run], python=PYTHON, environment=environment)
    return served.error or first_difference(served.answers, prompts, theirs)


@pytest.mark.matrix
@pytest.mark.parametrize("family", BASES)
def test_vllm_cannot_serve_the_base_of_a_refused_family(base_of, environment, record_property, family):
    came_out = serve_base(base_of(family), environment)
    record_property("refused_family", family)
    assert BASES[family] in came_out


@pytest.mark.matrix
@pytest.mark.parametrize("family", ALL_SPARSE)
def test_experts_with_another_activation_are_refused_where_vllm_ignores_it(
    base_of, environment, record_property, family
):
    came_out = serve_base(base_of(family, hidden_act="gelu"), environment)
    record_property("experts_of", family)
    assert bool(came_out) == (family in VLLM_EXPERTS), came_out


@pytest.mark.matrix
def test_an_edited_loop_is_not_served_from_the_compile_cache(export_of, environment):
    export = export_of(Case("llama"))
    config = export / "config.json"
    engine = {**ENGINE, "max_model_len": 192, **WHOLE_PROMPTS, "enforce_eager": False, "model": str(export)}
    answers = []
    for fields in ({}, {"loop_steps": 2}, {"loop_kv": "reference"}):
        config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
        run = {"engine": engine, "calls": [PROMPTS], "max_tokens": NEW_TOKENS}
        [looped] = run_vllm([run], python=PYTHON, environment=environment)
        assert not first_difference(looped.answers, PROMPTS, answers_of_transformers(export, PROMPTS, NEW_TOKENS))
        answers.append(looped.answers)
    assert answers[0] != answers[1] != answers[2]


@pytest.mark.matrix
def test_torch_computes_a_router_with_a_bias_wrongly_in_a_second_pass(environment):
    """Otherwise the refusal of `VLLM_CPU_EAGER` can go."""
    command = [PYTHON, "-P", ROOT / "tests" / "support" / "compiled_router.py"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.1


def _templates(directory, names):
    """What an installation puts into the package from elsewhere, should it be there too."""
    return {"templates", "__pycache__"} & set(names)


def test_verify_compares_vllm_with_transformers(export_of, environment, tmp_path):
    installed = shutil.copytree(ROOT / "loopexport", tmp_path / "site" / "loopexport", ignore=_templates)
    shutil.copytree(ROOT / "templates", installed / "templates")

    def verify(case, *flags):
        command = [PYTHON, "-P", "-m", "loopexport", "verify", str(export_of(case)), "--runtime", "vllm", "--", *flags]
        variables = {**os.environ, **environment, "PYTHONPATH": str(installed.parent)}
        return subprocess.run(command, capture_output=True, text=True, env=variables)

    good, refused = verify(Case("llama")), verify(Case("llama", REFERENCE), "--enable-chunked-prefill")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "vLLM gives the greedy tokens of transformers: 4 prompts, 24 tokens each, asked twice: 192" in good.stdout
    assert good.stdout.rstrip().endswith(
        "TransformersForCausalLM, attention CPU_ATTN, float32, eager, block size 32, chunks of 48 tokens, "
        "prefix cache on, tensor parallel 1"
    )
    assert refused.returncode == 1
    assert "cannot serve this looped model on vLLM: kv reference depends on where chunks start" in refused.stdout


@pytest.mark.skipif("LOOPEXPORT_SMOLLM" not in os.environ, reason="needs SmolLM2")
def test_a_served_export_answers_the_openai_client(environment, tmp_path):
    looped = loopexport.convert(
        os.environ["LOOPEXPORT_SMOLLM"], tmp_path / "looped", weights="hardlink", span=(13, 17), steps=3
    ).root
    command = [ROOT / "examples" / "serve_vllm" / "serve.sh", looped, "What is the capital of France?"]
    options = ["--dtype", "float32", "--enforce-eager", "--port", "8123"]
    path = f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, **environment, "PATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = subprocess.run(
        [sys.executable, ROOT / "examples" / "answer.py", *command[1:]], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == theirs.stdout.strip().partition(": ")[2]


@pytest.mark.matrix
@pytest.mark.parametrize("looped", PARALLEL_SERVERS, ids=str)
def test_the_server_with_tensor_parallel_2_gives_the_tokens_of_transformers(export_of, environment, tmp_path, looped):
    export = export_of(looped)
    prompts, theirs = answers_without_ties(export, {})
    variables = {**environment, **ENVIRONMENTS[looped.setting]}
    with running_server(PYTHON, export, variables, tmp_path, 8124, **ENGINES[looped.setting]) as server:
        answers = [server.complete(prompt, NEW_TOKENS)["token_ids"] for prompt in prompts]
    assert answers == theirs.tokens
