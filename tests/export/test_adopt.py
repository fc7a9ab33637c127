"""`adopt`: what `save_pretrained` wrote after training becomes an export, in place, and says so."""

from __future__ import annotations

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import loopexport
from loopexport import templates
from loopexport.export import adoption
from loopexport.export.card import read_metadata
from loopexport.export.own_code import template_bytes
from support.commands import checks, run, sha256, tree
from support.compare import assert_bitwise, assert_differs
from support.damage import EXPLODES, edit_config, flip_last_byte
from support.forwards import full_forward
from support.hub_cache import HubCache
from support.paths import ROOT
from support.refusals import assert_refused
from support.small_tokenizer import write_tokenizer
from support.tiny import tiny_tokens
from support.trained import save_trained

LLAMA_CARD = "---\nlicense: llama3.2\nlanguage: [en]\n---\n# Base\n"


@pytest.fixture(scope="session")
def saved(export_dir, tmp_path_factory):
    """A trained llama, as it was saved."""
    return save_trained(export_dir("llama"), tmp_path_factory.mktemp("saved") / "tuned")


@pytest.fixture
def trained(saved, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(saved, tmp_path / "tuned")


def edit_card(root, text):
    (root / "README.md").write_text(text)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"dtype": torch.bfloat16, "vocab": 140}),
        ("qwen3", {"max_shard_size": "200KB"}),  # tied
        ("gpt2", {}),
        ("qwen3_moe", {}),
        ("gemma3_text", {"vocab": 140}),
    ],
    ids=["llama", "bf16 resized", "tied shards", "gpt2", "experts", "mixed resized"],
)
def test_adopted_export_is_verified_and_gives_the_trained_native_model(export_dir, tmp_path, family, options):
    root = save_trained(export_dir(family), tmp_path / "tuned", **options)
    before = tree(root)
    adopted = loopexport.adopt(root)
    assert {name: digest for name, digest in tree(root).items() if name in before} == before
    assert set(tree(root)) - set(before) == {"README.md", "base/config.json", "loopexport.json"}
    outcome, status = checks(root, "--full")
    assert status == 0, outcome
    assert all(check["passed"] for check in outcome.values())
    assert outcome["weights are as recorded"]["detail"].endswith("compared by sha256")
    assert "steps 1 is bitwise the native model" in outcome
    assert not [name for name in outcome if "base" in name]
    assert adopted.manifest.trained
    assert run("restore", root, tmp_path / "native").exit_code == 0
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", trust_remote_code=False)
    looped = AutoModelForCausalLM.from_pretrained(root, trust_remote_code=True)
    tokens = tiny_tokens(1, 8)
    assert_differs(full_forward(looped, tokens), full_forward(native, tokens))
    looped.config.loop_steps = 1
    assert_bitwise(full_forward(looped, tokens), full_forward(native, tokens))


def test_card_and_inspect_say_that_the_weights_were_trained(trained):
    result = run("adopt", trained, "--base", "org/Base-1B")
    assert result.exit_code == 0, result.stderr
    assert f"Adopted {trained}" in result.stdout
    card = (trained / "README.md").read_text()
    assert "# Base-1B, looped and trained\n" in card
    assert "**Its weights were trained since, and are not\nthe base model's.**" in card
    assert "byte for" not in card
    assert "without any training" not in card
    metadata = read_metadata(card)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/Base-1B", "finetune")
    assert "Weights  1 file, trained: they are not the base's\n" in run("inspect", trained).stdout
    assert json.loads((trained / "loopexport.json").read_text())["trained"] is True


def test_changed_weights_are_found_and_the_remedy_is_another_adoption(trained, tmp_path):
    loopexport.adopt(trained)
    flip_last_byte(trained / "model.safetensors")
    outcome, status = checks(trained, "--files-only", "--full")
    assert status == 1
    assert outcome["weights are as recorded"]["detail"] == "model.safetensors has changed (sha256)"
    assert "has changed (sha256)" in run("restore", trained, tmp_path / "native").stderr


def test_name_comes_from_base_then_from_the_config_then_from_the_directory(trained, tiny_base, export_dir, tmp_path):
    def name(base=None):
        return loopexport.plan_adopt(trained, base=base).base.origin.name

    assert name() == "tuned"
    edit_config(trained, _name_or_path=str(tmp_path / "looped-1b"))
    assert name() == "looped-1b"
    assert name("org/Base") == "org/Base"
    assert name(tiny_base("llama")) == name(export_dir("llama")) == "llama"


def test_nothing_that_is_published_names_a_path_of_this_machine(trained, tiny_base, tmp_path):
    edit_config(trained, _name_or_path=str(tmp_path / "looped-1b"))
    loopexport.adopt(trained, base=tiny_base("llama"))
    assert checks(trained, "--files-only")[1] == 0
    for path in trained.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


def test_licence_and_tokenizer_come_from_the_base(trained, tmp_path):
    base = tmp_path / "base-model"
    base.mkdir()
    write_tokenizer(base, "PreTrainedTokenizerFast")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "LICENSE").write_text("the terms")
    (base / "modeling_own.py").write_text(EXPLODES)
    edit_card(base, LLAMA_CARD)
    loopexport.adopt(trained, base=base)
    assert checks(trained, "--files-only")[1] == 0
    names = set(tree(trained))
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "NOTICE"} <= names
    assert "modeling_own.py" not in names
    card = (trained / "README.md").read_text()
    assert read_metadata(card)["license"] == "llama3.2"
    assert "modeling code was added, the weights were trained." in card
    loopexport.restore(trained, tmp_path / "native")
    restored = (tmp_path / "native" / "README.md").read_text()
    assert read_metadata(restored) == {"license": "llama3.2", "language": ["en"]}
    assert not (tmp_path / "native" / "NOTICE").exists()


def test_own_tokenizer_and_licence_stay(trained, tmp_path):
    base = tmp_path / "base-model"
    base.mkdir()
    for folder, token in ((base, "LlamaTokenizer"), (trained, "PreTrainedTokenizerFast")):
        write_tokenizer(folder, token)
    (base / "vocab.json").write_text("{}")
    edit_card(base, LLAMA_CARD)
    edit_card(trained, "---\nlicense: mit\n---\n# Mine\n")
    (trained / "LICENSE").write_text("mine")
    (base / "LICENSE").write_text("theirs")
    before = {name: sha256(trained / name) for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE")}
    loopexport.adopt(trained, base=base)
    assert {name: sha256(trained / name) for name in before} == before
    assert not (trained / "vocab.json").exists()
    metadata = read_metadata((trained / "README.md").read_text())
    assert (metadata["license"], metadata["language"]) == ("mit", ["en"])
    assert "# Mine\n" in (trained / "base" / "README.md").read_text()


def test_card_of_the_export_is_not_kept_because_its_words_are_of_other_weights(trained, export_dir):
    shutil.copy(export_dir("llama") / "README.md", trained / "README.md")
    loopexport.adopt(trained, base=export_dir("llama"))
    assert not (trained / "base" / "README.md").exists()


def test_tokenizer_with_code_of_its_own_moves_to_base(trained):
    (trained / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    (trained / "vocab.txt").write_text("a\n")
    result = run("adopt", trained)
    assert "Moves    vocab.txt to base/" in result.stdout
    assert "the tokenizer needs code of the base (own.Tokenizer)" in result.stdout
    assert checks(trained, "--files-only")[1] == 0
    assert {"base/vocab.txt", "base/tokenizer_config.json"} <= set(tree(trained))
    assert not (trained / "vocab.txt").exists()


def test_code_of_an_earlier_version_stays_and_missing_code_is_written(trained):
    for name in templates.FILES:
        (trained / name).unlink()
    without = shutil.copytree(trained, trained.with_name("without"))
    for path in (ROOT / "tests" / "data" / "templates-two-files").glob("*.py"):
        shutil.copy(path, trained)
    code = {path.name for path in trained.glob("*.py")}
    for root in (trained, without):
        loopexport.adopt(root)
        assert checks(root, "--files-only")[1] == 0
    assert {path.name for path in trained.glob("*.py")} == code
    assert all((without / name).read_bytes() == template_bytes(name) for name in templates.FILES)


def test_dropped_nulls_and_foreign_auto_map_are_put_right(trained):
    config = json.loads((trained / "config.json").read_text())
    config = {name: value for name, value in config.items() if value is not None}
    config["auto_map"] = {name: f"me/looped--{value}" for name, value in config["auto_map"].items()}
    config["loop_anchor"] = 0
    (trained / "config.json").write_text(json.dumps(config))
    adopted = loopexport.adopt(trained)
    assert checks(trained, "--files-only")[1] == 0
    assert adopted.config["auto_map"]["AutoConfig"] == "configuration_looped.LoopedLlamaConfig"


def test_dry_run_prints_the_plan_and_writes_nothing(trained):
    before = tree(trained)
    result = run("adopt", trained, "--dry-run", "--json")
    values = json.loads(result.stdout)
    assert (values["written"], values["model_type"], values["base"]) == (False, "llama", "tuned")
    assert values["files_written"] == ["base/config.json"]
    assert "Dry run: nothing was written." in run("adopt", trained, "--dry-run").stdout
    assert tree(trained) == before


def test_failure_leaves_the_directory_as_it_was(trained, monkeypatch):
    (trained / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    (trained / "vocab.txt").write_text("a\n")
    edit_card(trained, "# Mine\n")
    before, write = tree(trained), adoption.write_card_and_manifest

    def fail(export, files):
        write(export, files)
        raise OSError("the disk is full")

    monkeypatch.setattr(adoption, "write_card_and_manifest", fail)
    with pytest.raises(OSError, match="full"):
        loopexport.adopt(trained)
    assert tree(trained) == before
    assert not (trained / "base").exists()


def as_adapter(root):
    for path in root.glob("*"):
        path.unlink()
    (root / "adapter_config.json").write_text("{}")
    (root / "adapter_model.safetensors").write_bytes(b"")


def with_tensor(root, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(root / "model.safetensors")
    save_file({**tensors, name: torch.zeros(1)}, root / "model.safetensors", metadata={"format": "pt"})


def without_layer(root, layer):
    from safetensors.torch import load_file, save_file

    tensors = {name: each for name, each in load_file(root / "model.safetensors").items() if f".{layer}." not in name}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "nothing": (lambda root: shutil.rmtree(root), "give one that `save_pretrained` wrote"),
    "export": (lambda root: loopexport.adopt(root), "seems to be an export already"),
    "base folder": (lambda root: (root / "base").mkdir(), "move loopexport.json and base/ elsewhere"),
    "adapter": (as_adapter, "holds an adapter (adapter_config.json), not a whole model; merge it"),
    "adapter beside": (lambda root: (root / "adapter_config.json").write_text("{}"), "merge it"),
    "tensors of an adapter": (
        lambda root: with_tensor(root, "model.layers.1.q.lora_A.weight"),
        "transformers would ignore them",
    ),
    "missing layer": (lambda root: without_layer(root, 5), "the weights have none for layer 5"),
    "pickle": (lambda root: (root / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin in"),
    "native": (lambda root: edit_config(root, model_type="llama"), "`loopexport convert` makes one of it"),
    "no type": (lambda root: edit_config(root, model_type=None), "`loopexport convert` makes one of it"),
    "unknown family": (lambda root: edit_config(root, model_type="looped_nothing"), "of family 'nothing'"),
    "no config": (lambda root: (root / "config.json").unlink(), "no config.json in"),
    "headless": (lambda root: edit_config(root, architectures=["LoopedLlamaModel"]), "saved without its head"),
    "impossible loop": (lambda root: edit_config(root, loop_steps=0), "holds an impossible loop: steps 0"),
    "span outside": (lambda root: edit_config(root, loop_span=[1, 9]), "ends outside the model"),
    "misspelt field": (lambda root: edit_config(root, loop_stesp=3), "has loop_stesp, which is not a field"),
    "foreign code": (lambda root: (root / "looped_walk.py").write_text(EXPLODES), "is not LoopExport's"),
    "half of the code": (lambda root: (root / "looped_walk.py").unlink(), "is not LoopExport's"),
    "custom generate": (
        lambda root: os.makedirs(root / "custom_generate") or (root / "custom_generate/generate.py").write_text(""),
        "(configuration_looped.py",
    ),
    "no weights": (lambda root: (root / "model.safetensors").unlink(), "no weights in"),
    "path in the card": (lambda root: edit_card(root, f"from {root}/config.json ."), "contains the absolute path"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_adopted_is_refused_in_one_line(trained, tmp_path, kind):
    damage, says = REFUSED[kind]
    damage(trained)
    assert_refused(tmp_path, "adopt", trained, says=says)


def test_directory_without_loop_fields_is_refused(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("loop_")}
    (trained / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "adopt", trained, says="has no loop_span")


def test_base_that_does_not_exist_is_refused(trained, tmp_path):
    assert_refused(tmp_path, "adopt", trained, "--base", "./nowhere", says="neither a directory nor a Hub id")
    says = "--base nowhere is neither a directory nor a model in the Hub's cache; give a directory, or a Hub id such as"
    assert_refused(tmp_path, "adopt", trained, "--base", "nowhere", says=says)


def test_old_hub_id_without_an_owner_is_not_called_a_local_checkpoint(trained, tiny_base, tmp_path, monkeypatch):
    HubCache(tmp_path / "cache", monkeypatch).add("llama-old", tiny_base("llama"))
    loopexport.adopt(trained, base="llama-old")
    card = (trained / "README.md").read_text()
    assert "This model was made from `llama-old`: layers" in card


def test_base_of_another_architecture_in_the_cache_is_refused(trained, tiny_base, tmp_path, monkeypatch):
    HubCache(tmp_path / "cache", monkeypatch).add("org/Base", tiny_base("qwen3_moe"))
    assert_refused(
        tmp_path, "adopt", trained, "--base", "org/Base", says="model_type is qwen3_moe there and llama here"
    )


def test_base_of_another_architecture_is_refused(trained, tiny_base, export_dir, tmp_path):
    for base, says in (
        (tiny_base("qwen3_moe"), "model_type is qwen3_moe there and llama here; give the model that was trained"),
        (export_dir("qwen3_moe"), "model_type is qwen3_moe there and llama here"),
        (tiny_base("llama", num_hidden_layers=4), "the number of layers is 4 there and 6 here"),
        (tiny_base("llama", hidden_size=32), "the hidden size is 32 there and"),
    ):
        assert_refused(tmp_path, "adopt", trained, "--base", base, says=f"--base {base} is not what {trained}")
        assert_refused(tmp_path, "adopt", trained, "--base", base, says=says)


def test_base_may_have_fewer_tokens_and_more_if_the_trained_model_has_its_tokenizer(trained, tiny_base, tmp_path):
    assert run("adopt", trained, "--base", tiny_base("llama", vocab_size=100), "--dry-run").exit_code == 0
    larger = tiny_base("llama", vocab_size=200)
    assert_refused(tmp_path, "adopt", trained, "--base", larger, says="may be too few for the base's tokenizer; save")
    write_tokenizer(trained, "PreTrainedTokenizerFast")
    assert run("adopt", trained, "--base", larger, "--dry-run").exit_code == 0


def test_base_of_a_language_model_may_be_the_multimodal_model_that_it_was_taken_from(trained, tmp_path):
    base = tmp_path / "base-model"
    base.mkdir()
    text = json.loads((trained / "config.json").read_text()) | {"model_type": "llama"}
    for config, status in (({**text, "model_type": "mistral"}, 1), (text, 0)):
        (base / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
        assert run("adopt", trained, "--base", base, "--dry-run").exit_code == status


def test_model_that_was_trained_into_its_own_export_is_adopted_without_the_old_records(trained, export_dir):
    root = shutil.copytree(export_dir("llama"), trained.with_name("looped"))
    shutil.copytree(trained, root, dirs_exist_ok=True)
    assert "move loopexport.json and base/ elsewhere" in run("adopt", root).stderr
    (root / "loopexport.json").unlink()
    shutil.rmtree(root / "base")
    loopexport.adopt(root)
    assert checks(root, "--files-only", "--full")[1] == 0
    assert "looped and trained" in (root / "README.md").read_text()


def test_other_commands_name_adopt(trained):
    for command in ("verify", "inspect", "upgrade"):
        assert "run `loopexport adopt` on a looped model that was trained" in run(command, trained).stderr


def test_config_without_a_cache_is_named(trained):
    assert "use_cache" not in run("adopt", trained, "--dry-run").stdout
    edit_config(trained, use_cache=False)
    assert "Note     config.json has use_cache false" in run("adopt", trained, "--dry-run").stdout


def test_files_of_a_hub_id_come_from_the_cache(trained, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    write_tokenizer(snapshot, None)
    (snapshot / "config.json").write_text("{}")
    edit_card(snapshot, LLAMA_CARD)
    cache = {"org/Base": str(snapshot / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo_id, name: cache.get(repo_id))
    assert "no licence is known" in run("adopt", trained, "--base", "org/Other", "--dry-run").stdout
    loopexport.adopt(trained, base="org/Base")
    metadata = read_metadata((trained / "README.md").read_text())
    assert (metadata["license"], metadata["base_model"]) == ("llama3.2", "org/Base")
    assert (trained / "tokenizer.json").exists()


def test_state_of_the_trainer_is_named_because_push_stops_at_it(trained):
    (trained / "training_args.bin").write_bytes(b"")
    assert "Note     training_args.bin may be a pickle" in run("adopt", trained, "--dry-run").stdout
