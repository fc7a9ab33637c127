"""The model card: held to golden files, valid for the Hub's own reader, and kept when someone edits it.

After a wanted change, `python tests/export/test_card.py` writes the golden files; read the difference before you
commit.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from loopexport.base.checkpoint import Origin
from loopexport.base.licence import LICENCES, licence_of, licence_warnings
from loopexport.export.card import CardFacts, make_card, merge_card, published_card, read_metadata
from loopexport.export.manifest import OnnxRecord
from loopexport.loop.cost import Cost
from loopexport.loop.presets import find_preset
from loopexport.loop.spec import make_spec
from support.hub_double import HubDouble
from support.measured import GAIN, GROUP, HOSTILE, LOSS, TASK, made_measured, made_result

GOLDEN = Path(__file__).parent / "golden"
SHA = "0123456789abcdef0123456789abcdef01234567"
COST = Cost(24, 16, 1_500_000, 1_000_000, 3_000_000, 2_000_000, 65_536, 65_536)
LLAMA = "---\nlicense: llama3.2\nlanguage: [en, de]\ntags: [other]\nextra_gated_prompt: no\n---\n# Base\n"
GEMMA = "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://ai.google.dev/gemma/terms\n---\n"
LLAVA = "---\nlicense: mit\npipeline_tag: image-text-to-text\n---\n"
MULTIMODAL = {"text_config": {"num_hidden_layers": 16}, "vision_config": {}}
BASE = Origin("org/Base", SHA)
SPEC = make_spec(span="6:10", steps=3)
PRESET = find_preset("qwen3-30b-a3b-aime26")


GRAPH = {"steps": 3, "dtype": "fp32", "attention": "portable", "spec": {"span": [6, 10], "steps": 3}}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ONNX = {
    "genai_config.json": OnnxRecord(9),
    "model.onnx": OnnxRecord(9, **GRAPH, data=("model.safetensors",)),
    "model_k8_fp16.onnx": OnnxRecord(9, **{**GRAPH, "steps": 8, "dtype": "fp16"}, data=("model_fp16.onnx_data",)),
    "model_fp16.onnx_data": OnnxRecord(9),
}
PER_STEP = {"model.onnx": OnnxRecord(9, **{**GRAPH, "spec": {**GRAPH["spec"], "kv": "per_step"}}, data=SHARDS)}


def card(base_card="", origin=BASE, spec=None, **facts):
    loop = make_spec(**{"span": "6:10", "steps": 3, **(spec or {})})
    return make_card(CardFacts(origin, base_card, "llama", 16, loop, COST, **facts))


CARDS = {
    "hub_llama": lambda: card(LLAMA, Origin("meta-llama/Llama-3.2-1B", SHA)),
    "gemma_published": lambda: published_card(
        card(GEMMA, spec={"kv": "reference", "decode": "bypass"}, onnx=ONNX), "me/looped"
    ),
    "local_no_licence": lambda: card(origin=Origin("checkpoint"), spec={"span": ["2:4", "6:8"], "anchor": 0.5}),
    "preset": lambda: card(origin=Origin("org/Qwen3-30B-A3B", SHA), published=PRESET, spec=PRESET.fields),
    "foreign_tokenizer": lambda: card(
        tokenizer="base", spec={"rule": "heavy_ball", "first_n": 2, "decode": "first_n"}, quantisation="gptq"
    ),
    "no_tokenizer": lambda: card(origin=Origin("checkpoint"), tokenizer="nowhere"),
    "no_weights": lambda: card("---\nlicense: apache-2.0\n---\n", has_weights=False),
    "onnx": lambda: card(onnx={**PER_STEP, "genai_config.json": OnnxRecord(9)}, spec={"kv": "per_step"}),
    "results": lambda: card(
        measured=made_measured(
            own=[made_result(SPEC, GROUP, LOSS, TASK), made_result(SPEC, HOSTILE, GAIN, settings={"num_fewshot": 5})],
            other=[made_result(make_spec(span="2:4", steps=6), TASK)],
        )
    ),
    "multimodal": lambda: card(LLAVA, origin=Origin("org/Llava", SHA), config=MULTIMODAL),
    "steps_by_span": lambda: card(spec={"span": ["2:4x2", "6:10x3"], "steps": None}),
    "path": lambda: card(spec={"span": None, "steps": None, "path": "0-9,6-9,8-10,13-15"}),
    "onnx_latents": lambda: card(onnx=PER_STEP, spec={"kv": "per_step"}),
}


@pytest.mark.parametrize("name", CARDS)
def test_card_is_the_golden_one(name):
    assert CARDS[name]() == (GOLDEN / f"card_{name}.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    version("huggingface_hub") < "1", reason="its ModelCard asks the real Hub, whatever HF_ENDPOINT says"
)
@pytest.mark.parametrize("name", CARDS)
def test_card_is_valid_for_the_hub(name, monkeypatch):
    from huggingface_hub import ModelCard, constants

    server = HubDouble()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    read = ModelCard(CARDS[name]())
    read.validate()
    assert ("POST", "/api/validate-yaml") in server.asked
    server.shutdown()
    values = read.data.to_dict()
    task = "image-text-to-text" if name == "multimodal" else "text-generation"
    assert (values["library_name"], values["pipeline_tag"]) == ("transformers", task)
    assert {"custom_code", "looped"} <= set(values["tags"])


def test_metadata_name_the_base_and_inherit_its_licence_and_nothing_else():
    values = read_metadata(CARDS["hub_llama"]())
    assert (values["base_model"], values["base_model_relation"]) == ("meta-llama/Llama-3.2-1B", "finetune")
    assert (values["license"], values["language"]) == ("llama3.2", ["en", "de"])
    assert set(values) == {
        "license", "language", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags",
    }  # fmt: skip
    gemma = read_metadata(CARDS["gemma_published"]())
    assert (gemma["license"], gemma["license_name"]) == ("other", "gemma")
    assert "base_model" not in read_metadata(CARDS["local_no_licence"]()), "a local directory is no model of the Hub"


@pytest.mark.parametrize(
    ("config", "base_card", "task"),
    [
        ({}, LLAVA, "text-generation"),
        (MULTIMODAL, "---\npipeline_tag: any-to-any\n---\n", "any-to-any"),
        (MULTIMODAL, "---\npipeline_tag: [a, b]\n---\n", "image-text-to-text"),
        ({**MULTIMODAL, "audio_config": {}}, "", "any-to-any"),
        ({"text_config": {}, "audio_config": {}}, "", "audio-text-to-text"),
    ],
)
def test_task_is_that_of_the_base_or_of_what_it_reads(config, base_card, task):
    text = card(base_card, config=config)
    assert read_metadata(text)["pipeline_tag"] == task
    assert ("AutoModelForMultimodalLM" in text) == (task == "audio-text-to-text")


def test_card_without_a_processor_says_so():
    text = card(LLAVA, config=MULTIMODAL, processor=False)
    assert "had no processor" in text
    assert "import AutoModelForImageTextToText, AutoTokenizer\n" in text
    assert "AutoProcessor.from_pretrained" not in text
    assert "had no processor" not in card(LLAVA, config=MULTIMODAL)


def path_card(trained=False, **fields) -> str:
    """The card of a path, on one line."""
    spec = {"span": None, "steps": None, "path": "0-4,2-6,1-15", **fields}
    return " ".join(card(spec=spec, trained=trained).split())


def test_card_of_a_path_that_is_off_says_so():
    text = path_card(steps=1)
    assert "with a path through its 16 layers switched off (until `loop_steps` is 2, it is the base model)" in text
    assert "switched off: `loop_steps` is 1, and each layer runs once, as in the base model, until it is 2" in text
    assert "With `loop_steps` 2, every token goes through these layers" in text
    assert "model.config.loop_steps = 2 # the path; 1 is the base model" in text
    assert "more than once" not in text
    trained = path_card(steps=1, trained=True)
    assert "a path through its 16 layers is switched off until `loop_steps` is 2 (" in trained
    assert "it is the base model" not in trained


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"decode": "full"}, "Every token goes through these layers"),
        ({"decode": "bypass"}, "The tokens of the prompt and of other longer chunks go through these layers"),
        (
            {"decode": "first_n", "first_n": 3},
            "The tokens of the prompt and of the first 3 decode steps go through these layers",
        ),
    ],
)
@pytest.mark.parametrize("kv", ["shared", "per_step", "reference"])
def test_card_of_a_path_says_which_tokens_go_and_what_they_attend_to(fields, says, kv):
    text = path_card(**fields, kv=kv)
    how = "each time as in the base model" if kv == "per_step" else "where repeats attend to other keys and values"
    assert f"{says}, in this order, {how}" in text
    is_equal = fields["decode"] == "full" and kv != "reference"
    assert ("cached decoding equals a full forward |" in text) == is_equal
    assert ("cached decoding does **not** equal a full forward" in text) != is_equal


def test_repeats_are_of_the_base_where_there_are_none():
    assert "each time as in the base model" in path_card(path="0-3,6-15", kv="shared")


@pytest.mark.parametrize("name", CARDS)
def test_published_card_has_weights_and_the_repository_as_its_path(name):
    text = published_card(CARDS[name](), "me/x")
    assert "no weights" not in text
    assert 'path = "me/' in text
    assert not any(local in text for local in ('path = "."', "NAMESPACE"))
    assert published_card(text, "me/x") == text


def test_card_shows_a_graph_of_the_exports_own_k():
    names = ("model_k2_q4.onnx", "model_q4.onnx")
    text = card(onnx={**dict.fromkeys(names, ONNX["model.onnx"]), "genai_config.json": OnnxRecord(9)})
    assert 'OnnxModel(path, "model_q4.onnx")' in text
    assert '`loopexport run DIRECTORY "Hello" --file model_q4.onnx` does the same' in text
    assert 'model_file_name: "model", dtype: "q4"' in text


def test_runtimes_that_could_not_run_the_graphs_are_not_mentioned():
    gqa = {"model_gqa.onnx": replace(ONNX["model.onnx"], attention="gqa"), "genai_config.json": OnnxRecord(9)}
    told = {name: card(onnx=files) for name, files in {"none": {}, "mla": PER_STEP, "gqa": gqa, "all": ONNX}.items()}
    words = ("OnnxModel", "onnxruntime_genai", "ORTModelForCausalLM", "@huggingface/transformers")
    assert {name: sum(word in text for word in words) for name, text in told.items()} == {
        "none": 0, "mla": 1, "gqa": 3, "all": 4,
    }  # fmt: skip


def test_merging_keeps_every_word_of_the_edited_card():
    ours = card(LLAMA)
    theirs = "---\nlicense: mit # mine\nmodel-index: []\n---\n\n# Mine\n"
    merged = merge_card(ours, theirs)
    assert merged.endswith("---\n\n# Mine\n")
    assert read_metadata(merged) == {**read_metadata(ours), "license": "mit", "model-index": []}
    assert merge_card(ours, merged) == merged


@pytest.mark.parametrize(
    "theirs", ["", "words only\n", "---\n: broken [\n---\nwords\n", "---\ntags: one\n---\nwords\n"]
)
def test_merging_any_card_gives_valid_metadata_and_keeps_its_words(theirs):
    merged = merge_card(card(LLAMA), theirs)
    assert read_metadata(merged)["tags"] == ["custom_code", "looped", "loopexport"]
    assert merged.endswith(theirs.rsplit("---\n", 1)[-1])


def test_edited_card_that_lacks_nothing_is_not_touched():
    ours = card(LLAMA)
    theirs = ours.replace("language:\n- en\n- de\n", "language: [en, de] # two\n") + "more\n"
    assert merge_card(ours, theirs) == theirs


@pytest.mark.parametrize("name", LICENCES)
def test_licence_is_found_under_either_key_and_its_notice_is_in_the_card(name):
    licence = LICENCES[name]
    for metadata in (f"license: {name}", f"license: other\nlicense_name: {name}"):
        text = card(f"---\n{metadata}\n---\n")
        assert licence_of(read_metadata(text)) is licence
        assert licence.notice_text in text
        assert licence.built_with in text


@pytest.mark.parametrize(
    ("name", "repo", "warns"),
    [
        ("llama3.2", "Llama-3.2-1B-looped", False),
        ("llama3.2", "my-llama", True),
        ("llama3", "Llama-3-8B-looped", False),
        ("llama3", "Llama-8B-looped", True),
        ("llama2", "anything", False),
        ("gemma", "anything", False),
        ("apache-2.0", "anything", False),
    ],
)
def test_llama_licences_warn_about_the_name(name, repo, warns):
    warnings = licence_warnings({"license": name}, ["LICENSE.txt"], repo)
    assert any("name that begins with" in warning for warning in warnings) == warns


def test_missing_licence_text_is_warned_of():
    assert "add it to the directory as LICENSE" in licence_warnings({"license": "gemma"}, ["NOTICE"])[0]
    assert licence_warnings({"license": "gemma"}, ["licence.md"]) == []
    assert licence_warnings({"license": "mit"}, []) == []


def test_results_are_the_index_of_the_hubs_own_client():
    text = CARDS["results"]()
    values = yaml.safe_load(text.split("---\n")[1])["model-index"]
    assert read_metadata(text)["model-index"] == values
    name, results = model_index_to_eval_results(values)
    assert eval_results_to_model_index(name, results) == values
    assert [(each.dataset_type, each.metric_name, each.metric_value) for each in results[:3]] == [
        ("both", "acc", 0.39),
        ("both", "acc of the base", 0.41),
        ("both", "difference of acc, 95 % interval [-0.0400, +0.0010]", -0.02),
    ]
    assert all(re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", each.dataset_type, re.ASCII) for each in results)
    assert all(each.verified is False and each.task_type == "text-generation" for each in results)
    assert "&id" not in text


def test_merging_keeps_the_numbers_of_results():
    theirs = "---\nlicense: mit\nmodel-index: [{name: x, results: [{value: 0.5, verified: false, config: no}]}]\n---\n"
    [entry] = yaml.safe_load(merge_card(card(LLAMA), theirs).split("---\n")[1])["model-index"]
    assert entry == {"name": "x", "results": [{"value": 0.5, "verified": False, "config": "no"}]}


def test_long_results_are_cut_and_say_so():
    tasks = [{**TASK, "name": f"task_{i}"} for i in range(120)]
    text = card(measured=made_measured(own=[made_result(SPEC, *tasks)]))
    assert text.count("\n| task_") == 100
    assert "`loop_results.json` has 20 more." in text


def test_interval_without_zero_but_inconclusive_is_explained():
    corrected = {**TASK, "low": 0.001, "p": 0.03, "p_holm": 0.2}
    text = card(measured=made_measured(own=[made_result(SPEC, corrected)]))
    assert "the interval excludes zero, but p is 0.2;" in text
    assert "excludes zero" not in CARDS["results"]()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, make in CARDS.items():
        (GOLDEN / f"card_{name}.md").write_text(make(), encoding="utf-8")
