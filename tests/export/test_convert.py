"""What `convert` writes, and what it says it will write."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

import loopexport
from loopexport import templates
from loopexport.export.card import read_metadata
from loopexport.export.own_code import template_bytes
from loopexport.files.placement import METHODS, place, settle_method
from support.commands import SPEC, run, sha256, tree
from support.paths import ROOT
from support.tiny import SPAN, tiny_model

TOKENIZER = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"model_max_length": 128}',
    "chat_template.jinja": "{{ x }}",
}


@pytest.fixture
def base(tiny_base, tmp_path):
    """A base of several shards with everything that a repository may hold besides."""
    root = tmp_path / "base"
    tiny_model("llama").save_pretrained(root, max_shard_size="100KB")
    for name, text in TOKENIZER.items():
        (root / name).write_text(text)
    (root / "LICENSE").write_text("free\n")
    (root / "NOTICE.txt").write_text("noted\n")
    (root / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en]\ntags: [other]\n---\n# Base\n")
    (root / ".env").write_text("HF_TOKEN=secret\n")
    (root / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "modeling_foreign.py").write_text("raise SystemExit\n")
    (root / "original").mkdir()
    (root / "original" / "params.json").write_text("{}")
    return root


def test_weights_and_index_are_the_bases_byte_for_byte_and_stored_once(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    names = sorted(path.name for path in base.glob("*.safetensors*"))
    assert len(names) > 3
    assert sorted(path.name for path in out.rglob("*.safetensors*")) == names
    assert {name: sha256(out / name) for name in names} == {name: sha256(base / name) for name in names}


def test_writes_exactly_these_files_and_nothing_foreign(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    weights = {path.name for path in base.glob("*.safetensors*")}
    expected = {
        *weights, *TOKENIZER, *templates.FILES, "LICENSE", "NOTICE.txt", "README.md", "config.json",
        "generation_config.json", "loopexport.json", "base/config.json", "base/README.md",
    }  # fmt: skip
    assert set(tree(out)) == expected
    manifest = json.loads((out / "loopexport.json").read_text())
    assert manifest["left_behind"] == [".env", "modeling_foreign.py", "original/params.json", "pytorch_model.bin"]


def test_readme_says_how_much_a_loop_adds_to_the_bases_files(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    sizes, carried = ({name: (root / name).stat().st_size for name in tree(root)} for root in (out, base))
    added = sum(sizes.values()) - sum(size for name, size in carried.items() if name in sizes)
    readme = (ROOT / "README.md").read_text()
    said = int(re.search(r"A loop adds about (\d+) kB", readme)[1])
    assert said == pytest.approx(added / 1000, rel=0.1)


def test_template_is_copied_byte_for_byte_and_depends_on_its_runtime_alone(export_dir):
    import ast

    for name in templates.FILES:
        assert (export_dir() / name).read_bytes() == template_bytes(name)
        imported = set()
        for node in ast.walk(ast.parse(template_bytes(name))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
        runtime = {"mlx", "mlx_lm"} if "mlx" in name else {"torch", "transformers"}
        assert imported - set(sys.stdlib_module_names) <= runtime


def test_config_is_the_bases_raw_json_with_only_our_fields_added(base, tmp_path):
    raw = json.loads((base / "config.json").read_text())
    raw |= {"rope_theta": 12345.0, "unknown_field": {"kept": [1, None]}, "auto_map": {"AutoModel": "foreign.Model"}}
    (base / "config.json").write_text(json.dumps(raw))
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    config = json.loads((out / "config.json").read_text())
    changed = {key: value for key, value in config.items() if raw.get(key, "absent") != value}
    assert changed == {
        "model_type": "looped_llama",
        "architectures": ["LoopedLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_looped.LoopedLlamaConfig",
            "AutoModel": "modeling_looped.LoopedLlamaModel",
            "AutoModelForCausalLM": "modeling_looped.LoopedLlamaForCausalLM",
            "AutoModelForSequenceClassification": "modeling_looped.LoopedLlamaForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_looped.LoopedLlamaForTokenClassification",
            "AutoModelForQuestionAnswering": "modeling_looped.LoopedLlamaForQuestionAnswering",
        },
        "loop_span": [1, 4],
        "loop_steps": 3,
        "loop_damping": None,
        "loop_anchor": 0.0,
        "loop_mode": "block",
        "loop_kv": "shared",
        "loop_decode": "full",
        "loop_first_n": 0,
        "loop_rule": "euler",
        "loop_schedule": None,
        "loop_momentum": None,
        "loop_history": None,
        "loop_frozen_routing": False,
        "loop_norm_interpolation": False,
    }
    assert set(raw) <= set(config)
    assert (out / "base" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_manifest_holds_a_digest_of_every_file(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3, weights="copy").root
    manifest = json.loads((out / "loopexport.json").read_text())
    actual = tree(out)
    del actual["loopexport.json"]
    for name, record in manifest["weights"].items():
        assert record["xxh3_128"] == xxhash.xxh3_128(Path(out / name).read_bytes()).hexdigest()
        del actual[name]
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == actual
    assert str(tmp_path) not in (out / "loopexport.json").read_text()


def test_hardlinked_weights_have_a_header_digest_and_one_inode(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3, weights="hardlink").root
    manifest = json.loads((out / "loopexport.json").read_text())
    for name, record in manifest["weights"].items():
        assert os.path.samefile(out / name, base / name)
        assert set(record) == {"size", "header_sha256"}
    assert manifest["weights_method"] == "hardlink"


def test_hardlinks_go_to_the_blob_behind_a_chain_of_links(base, tmp_path):
    """The Hub cache keeps links to blobs, which may be links themselves."""
    blobs, cache = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    shutil.copytree(base, blobs, ignore=shutil.ignore_patterns("*.safetensors"))
    cache.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file():
            if path.suffix == ".safetensors":
                (blobs / path.name).symlink_to(path)
            (blobs / f"first-{path.name}").symlink_to(path.name)
            (cache / path.name).symlink_to(f"../../blobs/first-{path.name}")
    out = loopexport.convert(str(cache), tmp_path / "out", span=SPAN, steps=3, weights="hardlink").root
    for path in out.glob("*.safetensors"):
        assert not path.is_symlink()
        assert os.path.samefile(path, base / path.name)


@pytest.mark.parametrize("method", METHODS)
def test_every_weights_method_keeps_the_bytes(tmp_path, method):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(3 * 2**20 + 17))
    settled = settle_method(method, source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    if settled == "reflink" and settle_method("auto", source, tmp_path) != "reflink":
        with pytest.raises(loopexport.LoopExportError, match="use --weights auto or copy"):
            place(source, target, settled)
        assert not target.exists()
        return
    place(source, target, settled)
    assert target.read_bytes() == source.read_bytes()
    assert os.path.samefile(source, target) is (method == "hardlink")


def test_copy_goes_on_in_user_space_where_the_kernel_gives_up(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(40 * 2**20))
    calls = []

    def gives_up(read, write, count):
        calls.append(count)
        if len(calls) == 2:
            raise OSError(18, "Invalid cross-device link")
        return os.sendfile(write, read, None, 1000)

    monkeypatch.setattr(os, "copy_file_range", gives_up)
    advanced = []
    place(source, target, "copy", advanced.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(advanced) == source.stat().st_size


def test_source_is_never_changed(base, tmp_path):
    before = {path: (sha256(path), path.stat().st_mtime_ns) for path in base.rglob("*") if path.is_file()}
    for method in ("auto", "hardlink", "copy"):
        loopexport.convert(str(base), tmp_path / method, span=SPAN, steps=3, weights=method)
    assert {path: (sha256(path), path.stat().st_mtime_ns) for path in base.rglob("*") if path.is_file()} == before


def test_two_conversions_write_the_same_bytes(base, tmp_path):
    first, second = (loopexport.convert(str(base), tmp_path / name, span=SPAN, steps=3) for name in "ab")
    assert tree(first.root) == tree(second.root)


def test_adds_less_than_a_megabyte(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3).root
    carried = sum((base / name).stat().st_size for name in tree(out) if (base / name).is_file())
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert total - carried < 2**20


def test_card_inherits_the_licence_and_names_base_spec_and_caveat(base, tmp_path):
    out = loopexport.convert(str(base), tmp_path / "out", span=SPAN, steps=3, kv="per_step").root
    card = (out / "README.md").read_text()
    metadata = read_metadata(card)
    assert metadata["license"] == "llama3.2"
    assert metadata["language"] == ["en"]
    assert metadata["tags"] == ["custom_code", "looped", "loopexport"]
    assert "base_model" not in metadata  # a local directory's name is no Hub id
    for text in ("Gains are not guaranteed", "`base`", "layers 1 to 3", "`per_step`", "12 layer evaluations", "2.00x"):
        assert text in card, text
    assert "h_(k+1) = h_k + 0.333333 (g(h_k) - h_k)    k = 1 .. 2" in card


def test_plan_tells_span_cost_cache_and_disk(base):
    text = run("convert", base, "out", *SPEC, "--kv", "per_step", "--weights", "copy", "--dry-run").stdout
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    for part in (
        "1:4, half-open: layers 1 to 3 of 0 to 5, depth 0.17 to 0.67",
        "3 steps, rule euler, s = 0.333333, anchor 0",
        "mode block, kv per_step, decode full, refinements: none",
        "12 layer evaluations a token instead of 6: 2.00x",
        f"{12 * 2 * 2 * 16 * 4:,} K/V cache bytes a token instead of {6 * 2 * 2 * 16 * 4:,}",
        f"copy, {size:,} bytes of disk",
        "a gain is unproven for this model and this loop",
    ):
        assert part in text, part


def test_plan_tells_which_decode_steps_cost_as_much_as_the_base(base):
    decodes = {
        "full": ([], "2.00x\n"),
        "bypass": (["--decode", "bypass"], "2.00x; decode steps run at the base's cost\n"),
        "first_n": (
            ["--decode", "first_n", "--first-n", "8"],
            "2.00x; decode steps after the first 8 run at the base's cost\n",
        ),
    }
    for options, says in decodes.values():
        assert says in run("convert", base, "out", *SPEC, *options, "--dry-run").stdout


def test_dry_run_writes_nothing(base, tmp_path):
    result = run("convert", base, tmp_path / "new" / "out", *SPEC, "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_json_is_one_object_on_stdout(base, tmp_path):
    for options, written in (([], True), (["--dry-run", "--overwrite"], False)):
        result = run("convert", base, tmp_path / "out", *SPEC, "--json", *options)
        values = json.loads(result.stdout)
        assert values["written"] is written
        assert values["cost"]["multiplier"] == 2.0
        assert values["spec"]["loop_damping"] == pytest.approx(1 / 3)
        assert values["layers"] == [1, 2, 3]


def test_spec_file_gives_options_and_flags_override_it(base, tmp_path):
    spec = tmp_path / "loop.yaml"
    spec.write_text("span: 1:4  # YAML reads 1:4 as the number 64\nsteps: 5\nanchor: 0.5\nkv: per_step\n")
    values = json.loads(run("convert", base, "out", "--spec", spec, "--steps", 3, "--json", "--dry-run").stdout)
    spec = values["spec"]
    assert (spec["loop_span"], spec["loop_steps"], spec["loop_anchor"]) == ([1, 4], 3, 0.5)
    assert spec["loop_kv"] == "per_step"


def test_output_is_named_after_base_and_loop(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("convert", base, *SPEC).exit_code == 0
    assert (tmp_path / "base-looped-1-4-k3" / "loopexport.json").is_file()


def test_overwrite_replaces_an_export_and_only_that(base, tmp_path):
    out = tmp_path / "out"
    loopexport.convert(str(base), out, span=SPAN, steps=3)
    (out / "stray.txt").write_text("from an older export")
    refused = run("convert", base, out, *SPEC)
    assert (refused.exit_code, "use --overwrite" in refused.stderr) == (1, True)
    assert (out / "stray.txt").exists()
    done = run("convert", base, out, "--span", "1:4", "--steps", 5, "--overwrite")
    assert done.exit_code == 0
    assert loopexport.open_export(out).spec.steps == 5
    assert not (out / "stray.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_help_and_convert_import_neither_torch_nor_transformers(base, tmp_path):
    code = (
        "import sys; from loopexport.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy', 'safetensors') if m in sys.modules])"
    )
    for arguments in (["--help"], ["convert", "--help"], ["convert", str(base), str(tmp_path / "out"), *SPEC]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("[]"), done.stdout


@pytest.mark.parametrize(("method", "shown"), [("copy", True), ("hardlink", False)])
def test_progress_is_shown_on_stderr_only_when_bytes_are_copied(base, tmp_path, method, shown):
    command = [sys.executable, "-m", "loopexport", "convert", base, tmp_path / "out", *SPEC, "--weights", method]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ("copying weights" in done.stderr) is shown
    assert "copying weights" not in done.stdout
