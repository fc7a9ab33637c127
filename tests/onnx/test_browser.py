"""The page of `examples/browser` in headless Chromium: its tokens are those of ONNX Runtime, its errors say what to do.

`make test-browser` installs transformers.js and runs this file; without it or without Chromium, the tests are skipped.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil

import numpy as np
import onnx
import pytest

import loopexport
import loopexport.onnx
from loopexport.onnx import OnnxModel
from support.browser import show_pages
from support.paths import EXAMPLES
from support.tiny import SPAN

PACKAGES = os.environ.get("LOOPEXPORT_BROWSER", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT, NEW_TOKENS = "it is", 12
# (model, format, position of the slider); graphs of "shared" are K 1, 2 and 3, of "per_step" and in int4 1 and 3.
QUESTIONS = {
    "shared, K = 2": ("shared", "fp32", 0),
    "shared, K = 3": ("shared", "fp32", 1),
    "int4, K = 3": ("shared", "q4", 0),
    "per_step, K = 3": ("per_step", "fp32", 0),
}
REFUSED = {
    "nothing": "No loopexport.json in nothing/ (404). Give the directory or the public repository of an export",
    "no-graphs": "no-graphs/ has no ONNX graphs. Write some: loopexport onnx DIRECTORY --steps 1,2,4,8",
    "fused": "This browser runs none of the graphs: model.onnx (fp32, gqa). Write others: loopexport onnx DIRECTORY",
    "https://example.com/model": "is on another server; give a directory beside this page, or a Hub id",
}

pytestmark = pytest.mark.skipif(not PACKAGES or not CHROMIUM, reason="needs Chromium; `make test-browser` runs it")


@pytest.fixture(scope="module")
def models(made, one_trace, tmp_path_factory):
    """Directories to serve, by name."""
    root = tmp_path_factory.mktemp("browser")
    made_of = {"span": SPAN, "steps": 3, "weights": "copy"}
    loopexport.convert(str(made.parent / "base"), root / "no-graphs", **made_of)
    loopexport.convert(str(made.parent / "base"), root / "per_step", kv="per_step", **made_of)
    shutil.copytree(made, root / "shared")
    loopexport.onnx.export_onnx(root / "shared", steps=(1,), verify=False)
    loopexport.onnx.export_onnx(root / "shared", steps=(1, 3), dtype="int4", verify=False)
    loopexport.onnx.export_onnx(root / "per_step", steps=(1, 3), verify=False)
    (root / "fused").mkdir()
    manifest = json.loads((made / "loopexport.json").read_text())
    manifest["onnx"] = {"model.onnx": {**manifest["onnx"]["model.onnx"], "attention": "gqa"}}
    (root / "fused" / "loopexport.json").write_text(json.dumps(manifest))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def seen(models):
    """What each page showed: one run of the browser for all tests."""
    handler = runpy.run_path(str(EXAMPLES / "browser" / "serve.py"))["Handler"]
    asked = [
        {"model": f"{model}/", "format": chosen, "slider": place, "prompt": PROMPT, "limit": NEW_TOKENS}
        for model, chosen, place in QUESTIONS.values()
    ]
    refused = [{"model": name if ":" in name else f"{name}/"} for name in REFUSED]
    folders = {"/": EXAMPLES / "browser", **{f"/{name}/": path for name, path in models.items()}}
    results = show_pages(CHROMIUM, handler, folders, PACKAGES, [*asked, *refused])
    return dict(zip([*QUESTIONS, *REFUSED], results, strict=True))


def tokens_of(root, steps, chosen):
    """The greedy tokens of ONNX Runtime."""
    name = ("model" if steps == 3 else f"model_k{steps}") + ("_q4.onnx" if chosen == "q4" else ".onnx")
    if chosen == "q4":
        name = _computing_in_fp32(root, name)
    model = OnnxModel(root, name)
    prompt = np.array([model.tokenizer(PROMPT).input_ids])
    return model.generate(prompt, max_new_tokens=NEW_TOKENS)[0].tolist()


def _computing_in_fp32(root, name):
    """The name of a graph that does not round the hidden states, as a browser does not."""
    model = onnx.load(root / name, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    exact = name.replace(".onnx", "_exact.onnx")
    onnx.save(model, root / exact)
    return exact


@pytest.mark.parametrize("name", QUESTIONS)
def test_tokens_equal_those_of_onnx_runtime(seen, models, name):
    model, chosen, _ = QUESTIONS[name]
    steps = name[-1]
    assert seen[name]["error"] == ""
    assert seen[name]["loop_steps"] == steps
    base, loop = (tokens_of(models[model], each, chosen) for each in (1, int(steps)))
    assert seen[name]["base"] == base
    assert seen[name]["loop"] == loop
    assert base != loop or chosen == "q4", "the loop is idle, so that equality means nothing"


@pytest.mark.parametrize("name", REFUSED)
def test_errors_say_what_to_do(seen, name):
    assert REFUSED[name] in seen[name]["error"]
    assert seen[name]["can_choose"]
