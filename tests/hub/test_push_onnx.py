"""ONNX files of an export on their way to the Hub."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import xxhash

import loopexport
from loopexport.hub.allowlist import allowed_files
from loopexport.hub.transfers import large_transfers
from support.commands import run, sha256
from support.damage import flip_last_byte
from support.push import (
    REPO,
    TOKEN,
    bytes_received,
    copies,
    edit_loop,
    edit_manifest,
    environment,
    loopexport_command,
    pushed,
    weights,
)
from support.tiny import SPAN


def write_onnx(root, name, content, **record):
    """Write a file and list it in the manifest, as if `loopexport onnx` had written it."""
    (root / name).write_bytes(content)
    kind, digest = "sha256", sha256(root / name)
    if name.endswith("_data"):
        kind, digest = "xxh3_128", xxhash.xxh3_128(content).hexdigest()
    record = {"size": len(content), kind: digest, **record}
    edit_manifest(root, lambda values: values.setdefault("onnx", {}).update({name: record}))


def write_graph(root, data="model_fp16.onnx_data"):
    graph = {"steps": 3, "dtype": "fp16", "attention": "portable", "spec": {"span": list(SPAN), "steps": 3}}
    write_onnx(root, "model_fp16.onnx_data", b"data" * 999)
    write_onnx(root, "model_fp16.onnx", b"graph", **graph, data=[data])
    write_onnx(root, "genai_config.json", b"{}")


ONNX_LEAKS = {
    "graph": (lambda root: flip_last_byte(root / "model_fp16.onnx"), r"model_fp16.onnx has changed \(sha256\)"),
    "missing graph": (lambda root: (root / "model_fp16.onnx").unlink(), "model_fp16.onnx is missing"),
    "data": (lambda root: flip_last_byte(root / "model_fp16.onnx_data"), r"model_fp16.onnx_data .* \(xxh3_128\)"),
    "missing data": (lambda root: (root / "model_fp16.onnx_data").unlink(), "model_fp16.onnx_data is missing"),
    "config": (lambda root: flip_last_byte(root / "genai_config.json"), "genai_config.json has changed"),
    "token": (lambda root: write_onnx(root, "model.onnx", f"x {TOKEN}".encode()), "model.onnx contains something like"),
    "edited loop": (lambda root: edit_loop(root, 2), r"another loop \(loop_steps 3 -> 2\): run `loopexport onnx"),
    "other name": (lambda root: write_onnx(root, "evil.onnx", b"x"), "'evil.onnx' as an ONNX file, which"),
    "foreign data": (
        lambda root: write_graph(root, "secret.txt"),
        "model_fp16.onnx reads secret.txt, which is not part",
    ),
}


@pytest.mark.parametrize("kind", ONNX_LEAKS)
def test_onnx_files_that_are_not_as_written_stop_the_push(export, kind):
    spoil, says = ONNX_LEAKS[kind]
    write_graph(export)
    spoil(export)
    with pytest.raises(loopexport.LoopExportError, match=says):
        check_outgoing(loopexport.open_export(export))


def check_outgoing(export):
    large_transfers(export, allowed_files(export).large, lambda count: None)


def test_onnx_files_that_are_made_no_more_are_deleted_from_the_hub(hub, push, export):
    write_graph(export)
    names = {"model_fp16.onnx", "model_fp16.onnx_data", "genai_config.json"}
    pushed(push("--json"))
    assert names <= set(hub.repositories[REPO].files())
    edit_manifest(export, lambda values: values.pop("onnx"))
    assert {file["name"] for file in pushed(push("--json"))["files"] if file["how"] == "deleted"} == names
    assert not names & set(hub.repositories[REPO].files())


@pytest.fixture(scope="module")
def with_graphs(converted, tmp_path_factory):
    """The export with a graph on its three shards."""
    onnx = pytest.importorskip("loopexport.onnx")
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("ONNX export needs transformers 5")
    root = shutil.copytree(converted, tmp_path_factory.mktemp("graphs") / "export")
    onnx.export_onnx(root, verify=False)
    return root


FETCH = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"


@copies
def test_pushed_graphs_read_the_pushed_weights_and_give_the_tokens_of_the_local_ones(hub, with_graphs, tmp_path):
    home = tmp_path / "home"
    done = pushed(loopexport_command(hub, home, "push", with_graphs, REPO, "--json"))
    sent = sum(path.stat().st_size for path in with_graphs.glob("*.onnx*"))
    assert bytes_received(hub) == sent, "the weights were copied there"
    assert done["bytes_copied"] == sum((with_graphs / name).stat().st_size for name in weights(with_graphs))
    again = pushed(loopexport_command(hub, home, "push", with_graphs, REPO, "--json"))
    assert {file["how"] for file in again["files"]} == {"there"}
    fetch = [sys.executable, "-c", FETCH, REPO]
    fetched = subprocess.run(fetch, capture_output=True, text=True, env=environment(hub, home), check=True)
    there = Path(fetched.stdout.strip())
    assert all(check.passed for check in loopexport.verify(there, files_only=True, full=True))
    record = json.loads((there / "loopexport.json").read_text())["onnx"]["model.onnx"]
    assert external_files(there / "model.onnx") == record["data"] == sorted(weights(there))
    ours, theirs = (run("run", root, "w5 w6 w7", "--max-new-tokens", "9") for root in (there, with_graphs))
    assert ours.stdout == theirs.stdout
    assert len(ours.stdout.split()) == 9, ours.stderr
    run_examples((there / "README.md").read_text(), there)


def external_files(path):
    """Names of the files that a graph reads, sorted."""
    graph = pytest.importorskip("onnx_ir").load(path).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    return sorted({tensor.location for tensor in tensors if hasattr(tensor, "location")})


def run_examples(card, root):
    """Run the card's examples for ONNX Runtime and onnxruntime-genai."""
    pytest.importorskip("onnxruntime_genai")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = "".join(block for block in blocks if "OnnxModel" in block or "onnxruntime_genai" in block)
    code = code.replace(f'snapshot_download("{REPO}")', repr(str(root)))
    assert "OnnxModel(path" in code
    assert "onnxruntime_genai.Model(path)" in code
    exec(code, {})


@copies
@pytest.mark.parametrize("mode", ["uploaded", "removed"])
def test_onnx_files_go_along_however_the_weights_travel(hub, with_graphs, tmp_path, mode):
    root = shutil.copytree(with_graphs, tmp_path / "export")
    write_graph(root)
    expected = {path.name: path.read_bytes() for path in (*root.glob("*.onnx*"), *root.glob("*.safetensors"))}
    if mode == "removed":
        for name in weights(root):
            (root / name).unlink()
    option = ["--no-server-copy"] if mode == "uploaded" else []
    pushed(loopexport_command(hub, tmp_path / "home", "push", root, REPO, "--json", *option))
    files = hub.repositories[REPO].files()
    assert {name: files[name] for name in expected} == expected
    card = files["README.md"].decode()
    assert "| `model.onnx` | 3 | fp32 | portable | 3 `.safetensors` files |" in card
    assert "| `model_fp16.onnx` | 3 | fp16 | portable | `model_fp16.onnx_data` |" in card


def test_graphs_are_made_of_weights_that_are_here(weightless):
    pytest.importorskip("onnxscript")
    result = run("onnx", weightless)
    assert result.exit_code == 1
    assert "and a graph needs the weights: convert without --weights none" in result.stderr
