"""Whatever a generation config says, onnxruntime-genai takes our config and stops where transformers and we do."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import GenerationConfig

import loopexport
from loopexport.onnx import OnnxModel
from loopexport.onnx.check.comparison import load_torch
from loopexport.onnx.graph.genai import genai_config
from support.tiny import VOCAB

genai = pytest.importorskip("onnxruntime_genai")

PROMPT, NEW = [5, 6, 7, 8, 9], 12
END = "a token that comes sixth"
TOKENS = (  # of generation_config.json, of config.json
    ({"eos_token_id": END}, {"eos_token_id": 2}),
    ({"eos_token_id": [2, END]}, {}),
    ({"eos_token_id": [2, VOCAB, 10**6, END]}, {}),
    ({"eos_token_id": [2, VOCAB + 5]}, {}),
    ({"eos_token_id": None}, {"eos_token_id": END}),
    ({"do_sample": False}, {"eos_token_id": END}),
    ({}, {"eos_token_id": [END]}),
    (None, {"eos_token_id": [2, END], "pad_token_id": 1}),
    (None, {}),
    ({"eos_token_id": END, "pad_token_id": -1, "bos_token_id": None}, {}),
    ({"eos_token_id": END, "pad_token_id": [0, 1], "bos_token_id": [1]}, {}),
    ({"eos_token_id": [], "pad_token_id": "none"}, {}),
    ({"eos_token_id": str(2), "pad_token_id": True}, {}),
)
SAMPLING = (  # with what onnxruntime-genai gets
    ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
    ({"temperature": 1, "top_p": 1, "repetition_penalty": 1}, {"temperature": 1, "top_p": 1, "repetition_penalty": 1}),
    ({"temperature": "0.7", "top_k": "20", "top_p": "0.9"}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}),
    ({"top_k": -1}, {"top_k": 0, "top_p": 1.0}),
    ({"top_k": 0, "top_p": 0.5}, {"top_k": 0, "top_p": 0.5}),
    ({"top_k": 10**6}, {"top_k": VOCAB}),
    ({"top_p": 0.0, "top_k": 20}, {"top_k": 1}),
    ({"top_p": 1.5, "temperature": -1, "repetition_penalty": 0}, {}),
    ({"temperature": None, "top_k": [5], "top_p": True, "repetition_penalty": "much"}, {}),
    ({"temperature": 0.0}, {"temperature": 0.0}),
)


@pytest.fixture(scope="module")
def run(export_dir, traced, tmp_path_factory):
    """`run(generation, config)`: the genai_config, and how many tokens onnxruntime-genai generates with it."""
    import shutil

    from loopexport.onnx import build

    root = shutil.copytree(export_dir("llama", steps=2), tmp_path_factory.mktemp("genai") / "export")
    plan = loopexport.onnx.plan_onnx(root)
    graph = build.build_graph(plan, plan.export, *traced("llama"), plan.export.spec, {})
    ir.save(graph, root / "model.onnx")
    own = {path: json.loads(path.read_text()) for path in (root / "config.json", root / "base/config.json")}

    def make(generation, config):
        for path, fields in own.items():
            others = {name: value for name, value in fields.items() if not name.endswith("token_id")}
            path.write_text(json.dumps({**others, **config}))
        path = root / "generation_config.json"
        path.unlink(missing_ok=True)
        if generation is not None:
            path.write_text(json.dumps(generation))
        made = genai_config(loopexport.open_export(root), "model.onnx", graph.graph, plan.export.spec, "portable")
        (root / "genai_config.json").write_text(json.dumps(made))
        params = genai.GeneratorParams(model := genai.Model(str(root)))
        params.set_search_options(max_length=len(PROMPT) + NEW)
        generator = genai.Generator(model, params)
        generator.append_tokens(PROMPT)
        count = 0
        while not generator.is_done():
            generator.generate_next_token()
            count += 1  # the end token is not in the generator's sequence
        return made, count

    make.root = root
    return make


@pytest.fixture(scope="module")
def reference(run):
    return load_torch(run.root, 2)


def tokens_of_torch(reference, ends) -> list[int]:
    ids = torch.tensor([PROMPT])
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
    return reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, 5:].tolist()


@pytest.mark.parametrize(("generation", "config"), TOKENS, ids=str)
def test_genai_stops_where_transformers_does(run, reference, generation, config):
    free = tokens_of_torch(reference, None)
    end = next(token for token in free[5:] if token not in free[:5])
    generation, config = (
        None if fields is None else json.loads(json.dumps(fields).replace(json.dumps(END), str(end)))
        for fields in (generation, config)
    )
    made, count = run(generation, config)
    said = (config if generation is None else generation).get("eos_token_id")
    ends = [int(each) for each in np.ravel(said) if each is not None]
    expected = len(tokens_of_torch(reference, ends or None))
    assert count == expected, made["model"]
    if not isinstance(said, str):
        assert OnnxModel(run.root).generate(np.array([PROMPT]), max_new_tokens=NEW).shape == (1, expected)
    assert all(0 <= each < VOCAB for name in ("bos", "pad") for each in [made["model"].get(f"{name}_token_id", 0)])


@pytest.mark.parametrize(("fields", "expected"), SAMPLING, ids=str)
def test_genai_takes_the_sampling_fields(run, fields, expected):
    made, count = run({"do_sample": True, "eos_token_id": 2, **fields}, {})
    assert {name: value for name, value in made["search"].items() if name in {*fields, *expected}} == expected
    assert count > 0
