"""An export in MLX gives the logits of transformers, in all that mlx-lm does with a model, or says why not.

Needs an environment with mlx-lm, and nothing of LoopExport: `make test-mlx` makes one and names its Python in
LOOPEXPORT_MLX.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from itertools import groupby
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopexport
from loopexport.checks.mlx import (
    CACHED_AS_BY_TRANSFORMERS,
    FULL_AS_BY_TRANSFORMERS,
    check_mlx,
    relative_difference,
    run_mlx,
)
from loopexport.checks.probe import CHUNKS
from support.mlx_bases import save_for_mlx, save_weights_for_mlx
from support.mlx_cases import CASES, PATH, RECURRENT
from support.paths import ROOT
from support.small_tokenizer import write_tokenizer
from support.tiny import SPAN, save_tiny, tiny_tokens
from support.walk_configs import save_tiny_family

PYTHON = os.environ.get("LOOPEXPORT_MLX", "")
if not PYTHON:
    pytest.skip("needs mlx-lm; `make test-mlx` makes an environment with it", allow_module_level=True)

TOLERANCE = 1e-5  # of the logits' scale, in fp32
EFFECT = 1e-3  # if a loop changes less, it proves nothing
SCENES = ROOT / "tests" / "support" / "mlx_scenes.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
PORT = 8127
PROMPT = "it is 67890, isn't it"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`made(family, **overrides)`: base and export of a family, both as mlx-lm reads them."""
    known = {}

    def make(family, **overrides):
        key = (family, *overrides.items())
        if key not in known:
            folder = tmp_path_factory.mktemp(family)
            base = save_for_mlx(family, folder / "base", **overrides)
            if "vocab_size" in overrides:
                write_tokenizer(base, "PreTrainedTokenizerFast")
            kv = "per_step" if family == RECURRENT else "shared"
            options = {"span": SPAN, "steps": 3, "kv": kv, "weights": "copy", "mlx": True}
            known[key] = base, loopexport.convert(str(base), folder / "export", **options).root
        return known[key]

    return make


def logits_of(model, fields):
    """The logits of transformers with these loop fields."""
    for name, value in fields.items():
        setattr(model.config, name, value)
    with torch.no_grad():
        return model(tiny_tokens(2, sum(CHUNKS))).logits.numpy()


@pytest.fixture(scope="session")
def compared(request, made):
    """`compared[str(case)]`: what MLX computed, and transformers: looped, and what that must differ from."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = sorted((each["case"] for each in parameters if "case" in each), key=lambda case: case.family)
    theirs = [
        logits for _, group in groupby(cases, lambda case: case.family) for logits in by_transformers(made, group)
    ]
    if "gpt_oss" in {case.family for case in cases}:
        save_weights_for_mlx(made("gpt_oss")[1])
    prompt = {"tokens": tiny_tokens(2, sum(CHUNKS)).tolist(), "chunks": CHUNKS}
    runs = [{**prompt, "model": str(made(case.family)[1]), "fields": case.fields} for case in cases]
    results = run_mlx(runs, python=PYTHON)
    return {str(case): (ran, *logits) for case, ran, logits in zip(cases, results, theirs, strict=True)}


def by_transformers(made, cases):
    """For each case of one family, its logits, and those of the base and without frozen routing."""
    cases = list(cases)
    model = AutoModelForCausalLM.from_pretrained(made(cases[0].family)[1], trust_remote_code=True).eval()
    for case in cases:
        others = [{"loop_steps": 1}, *([{"loop_frozen_routing": False}] if case.loop.get("frozen_routing") else [])]
        yield logits_of(model, case.fields), [logits_of(model, {**case.fields, **other}) for other in others]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_transformers(compared, case):
    ran, looped, others = compared[str(case)]
    assert not ran.error
    assert relative_difference(ran.full, looped) <= TOLERANCE
    assert relative_difference(ran.cached, looped) <= TOLERANCE
    assert all(relative_difference(other, looped) > EFFECT for other in others)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi"])
def test_a_config_of_transformers_5_is_read_as_transformers_reads_it(tmp_path, family):
    rope = {"rope_type": "default", "rope_theta": 1e6, **({"partial_rotary_factor": 0.5} if family == "phi" else {})}
    save, plain = (save_tiny_family, {}) if family == "phi" else (save_tiny, {"sliding_window": None})
    base = save(family, tmp_path / "base", rope_parameters=rope, **plain)
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    export = loopexport.convert(str(base), tmp_path / "looped", span=SPAN, steps=3, mlx=True)
    checks = check_mlx(export, python=PYTHON)
    assert all(check.passed for check in checks), checks


@pytest.fixture(scope="session")
def played(made, tmp_path_factory):
    """What came of all scenes, by name and number."""
    folder = tmp_path_factory.mktemp("scenes")
    base, shared = made("llama", head_dim=32, vocab_size=300)
    spec = {"span": SPAN, "weights": "hardlink", "mlx": True}
    own = loopexport.convert(str(base), folder / "per_step", steps=3, kv="per_step", **spec).root
    naive = loopexport.convert(str(base), folder / "naive", steps=2, kv="per_step", damping=1.0, **spec).root
    path = {"path": PATH["path"], "weights": "hardlink", "mlx": True}
    along_a_path = loopexport.convert(str(base), folder / "path", **path).root
    hand = {"export": shared, "base": base, "span": SPAN}
    scenes = {
        "identity": {"scene": "identity", "export": own, "base": base},
        "short cache": {"scene": "short_cache", "export": own},
        "naive": {"scene": "naive", "export": naive, "base": base, "span": SPAN, "quantised": False},
        "naive, quantised cache": {"scene": "naive", "export": naive, "base": base, "span": SPAN, "quantised": True},
        "shared": {"scene": "shared", "steps": 3, **hand},
        "shared, K at load": {"scene": "shared", "steps": 4, **hand},
        "shared, quantised cache": {"scene": "shared", "steps": 3, "quantised": True, **hand},
        "shared, rotating cache": {"scene": "shared", "steps": 3, "max_size": 8, **hand},
        "quantised weights": {"scene": "quantised_weights", "steps": 3, "folder": folder / "quantised", **hand},
        **{
            f"{scene}, {name}": {"scene": scene, "export": export}
            for scene in ("batch", "stored_prompt")
            for name, export in (("shared", shared), ("per_step", own), ("path", along_a_path))
        },
        **{
            f"foreign cache, {name}": {"scene": "foreign_cache", "export": export, "fields": fields, **more}
            for name, (export, fields, more) in {
                "span": (own, [{"loop_span": [1, 3]}, {"loop_span": [2, 4]}], {}),
                "damping": (own, [{}, {"loop_damping": 0.2}], {}),
                "mode": (shared, [{}, {"loop_mode": "layer"}], {}),
                "quantised": (own, [{"loop_span": [1, 3]}, {"loop_span": [2, 4]}], {"quantised": True}),
                "K, shared": (shared, [{}, {"loop_steps": 4}], {}),
                "none": (own, [{}, {}], {}),
            }.items()
        },
        "drafted, shared": {"scene": "drafted", "export": shared, "base": base},
        "drafted, per_step": {"scene": "drafted", "export": own, "base": base},
    }
    asked, answered = folder / "scenes.json", folder / "outcomes.json"
    asked.write_text(json.dumps(list(scenes.values()), default=str))
    command = [PYTHON, "-P", str(SCENES), str(asked), str(answered)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, cwd=folder)
    return dict(zip(scenes, json.loads(answered.read_text()), strict=True))


def test_one_step_and_full_anchor_are_bitwise_the_base(played):
    outcome = played["identity"]
    assert outcome["differences"] == [0, 0]
    assert outcome["looped"] > EFFECT
    assert outcome["slots"] == 0


@pytest.mark.parametrize("scene", ["naive", "naive, quantised cache"])
def test_naive_looping_is_bitwise_the_unrolled_model(played, scene):
    outcome = played[scene]
    assert outcome["difference"] == 0
    assert (outcome["rounding"] > 0) == ("quantised" in scene)


@pytest.mark.parametrize(
    "scene", ["shared", "shared, K at load", "shared, quantised cache", "shared, rotating cache", "quantised weights"]
)
def test_shared_looping_is_the_loop_by_hand(played, scene):
    outcome = played[scene]
    assert outcome["difference"] <= TOLERANCE
    assert scene == "shared" or max(outcome.get("effect", 0), outcome.get("rounding", 0)) > EFFECT


@pytest.mark.parametrize("kv", ["shared", "per_step", "path"])
def test_a_padded_batch_gives_the_tokens_of_each_prompt(played, kv):
    outcome = played[f"batch, {kv}"]
    assert outcome["batch"] == outcome["single"]


@pytest.mark.parametrize("kv", ["shared", "per_step", "path"])
def test_a_saved_and_a_trimmed_prompt_cache_give_the_tokens_of_the_whole_prompt(played, kv):
    outcome = played[f"stored_prompt, {kv}"]
    assert outcome["answers"] == [outcome["single"]] * 2
    assert outcome["slots"] == {"shared": 6, "per_step": 12, "path": 10}[kv]


@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_speculative_decoding_gives_the_same_tokens(played, kv):
    outcome = played[f"drafted, {kv}"]
    assert outcome["drafted"] == outcome["single"]
    assert outcome["accepted"]


def test_a_cache_without_slots_for_iterations_is_refused_in_a_line(played):
    assert played["short cache"]["error"] == (
        "the cache has 6 slots, and this loop needs 12; make it with mlx_lm.models.cache.make_prompt_cache"
    )


@pytest.mark.parametrize(
    ("name", "field"), [("span", "span"), ("damping", "damping"), ("mode", "mode"), ("quantised", "span")]
)
def test_a_cache_that_another_loop_filled_is_refused(played, name, field):
    assert played[f"foreign cache, {name}"]["error"] == (
        f"the cache was filled under another loop setting ({field}); make a new one with "
        "mlx_lm.models.cache.make_prompt_cache"
    )


@pytest.mark.parametrize("name", ["K, shared", "none"])
def test_a_cache_goes_on_where_the_loop_allows_it(played, name):
    assert played[f"foreign cache, {name}"]["filled"]


def test_a_quantised_copy_holds_the_code(played):
    assert {"modeling_looped_mlx.py", "looped_mlx.py", "looped_spec.py"} <= set(played["quantised weights"]["files"])


REFUSED = {
    "kv reference depends on where the prompt ended": {"loop_kv": "reference"},
    "decode bypass has to know which tokens": {"loop_decode": "bypass"},
    "decode first_n has to know which tokens": {"loop_decode": "first_n", "loop_first_n": 2},
    "steps 0 must be a whole number": {"loop_steps": 0},
    "the path leaves out layer 2, whose cache would stay empty": {
        "loop_span": None, "loop_steps": 2, "loop_path": [[0, 2], [3, 6]],
    },
    "span 4:9 ends outside the model": {"loop_span": [4, 9]},
    "has no family unheard_of; use a newer one": {"model_type": "looped_unheard_of"},
    "no layer of the span has a router to freeze": {"loop_frozen_routing": True},
    "does not read a config.json of this form": {"model_type": "looped_gpt2"},
}  # fmt: skip


@pytest.fixture(scope="session")
def refusals(made):
    """The errors of `REFUSED`, in one process."""
    run = {"model": str(made("llama")[1]), "tokens": [[3, 4]], "chunks": [2]}
    return dict(
        zip(REFUSED, run_mlx([{**run, "fields": each} for each in REFUSED.values()], python=PYTHON), strict=True)
    )


@pytest.mark.parametrize("message", REFUSED)
def test_what_mlx_cannot_run_is_refused_in_a_line(refusals, message):
    error = refusals[message].error
    assert message in error
    assert "\n" not in error


def test_recurrent_layers_are_refused_under_shared(made):
    run = {"model": str(made(RECURRENT)[1]), "tokens": [[3, 4]], "chunks": [2]}
    [ran] = run_mlx([{**run, "fields": {"loop_kv": "shared"}}], python=PYTHON)
    assert "layer 2 remembers more than keys and values (ArraysCache)" in ran.error
    assert ran.error.endswith("set loop_kv to per_step")


def test_verify_compares_mlx_with_transformers(made, tmp_path):
    export = loopexport.open_export(made("qwen3")[1])
    checks = check_mlx(export, python=PYTHON)
    assert [check.name for check in checks] == [FULL_AS_BY_TRANSFORMERS, CACHED_AS_BY_TRANSFORMERS]
    assert all(check.passed for check in checks), checks
    assert "mlx-lm 0." in checks[0].detail
    broken = shutil.copytree(export.root, tmp_path / "broken")
    code = broken / "looped_mlx.py"
    code.write_text(code.read_text().replace("self.offset = natural.start", "self.offset = natural.offset"))
    whole, cached = check_mlx(loopexport.open_export(broken), python=PYTHON)
    assert (whole.passed, cached.passed) == (True, False)


def tool(name, *arguments):
    command = [str(Path(PYTHON).with_name(f"mlx_lm.{name}")), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def greedy_text(export):
    """What transformers answers to the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.fixture
def server(made):
    """The address of a server of mlx-lm."""
    _, export = made("llama", head_dim=32, vocab_size=300)
    command = [str(Path(PYTHON).with_name("mlx_lm.server")), "--model", str(export), "--trust-remote-code"]
    process = subprocess.Popen([*command, "--port", str(PORT)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{PORT}"
    try:
        while True:
            assert process.poll() is None, process.stderr.read()[-2000:]
            try:
                urlopen(f"{address}/health").close()
                break
            except URLError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_generate_answers_as_transformers_does_and_needs_the_flag(made):
    _, export = made("llama", head_dim=32, vocab_size=300)
    options = ("--model", export, "--prompt", PROMPT, "-m", 8, "--ignore-chat-template")
    done = tool("generate", *options, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("==========\n")[1] == greedy_text(export) + "\n"
    refused = tool("generate", *options)
    assert refused.returncode == 1
    assert "Pass trust_remote_code=True if you trust this model." in refused.stderr.splitlines()[-1]


def test_the_server_answers_as_transformers_does(made, server):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    request = Request(f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        text = json.load(answer)["choices"][0]["text"]
    assert text == greedy_text(made("llama", head_dim=32, vocab_size=300)[1])
