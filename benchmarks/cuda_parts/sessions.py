"""ONNX Runtime sessions on a provider that really runs, and which provider each node ran on."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def session(model: bytes | Path, provider: str, profile: Path | None = None) -> Any:
    """Load a graph.

    Args:
        model: the graph, or its path.
        provider: "cpu" or "cuda".
        profile: a prefix for the file in which ONNX Runtime notes each node that ran.

    Raises:
        RuntimeError: ONNX Runtime fell back to another provider.
    """
    import onnxruntime

    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    source = model if isinstance(model, bytes) else str(model)
    providers = list(dict.fromkeys((PROVIDER[provider], PROVIDER["cpu"])))
    made = onnxruntime.InferenceSession(source, options, providers=providers)
    if made.get_providers()[0] != PROVIDER[provider]:
        raise RuntimeError(f"ONNX Runtime {onnxruntime.__version__} fell back to {made.get_providers()[0]}")
    return made


def run_once(made: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs."""
    return made.run(None, feeds)


def nodes_by_provider(model: Any, tokens: np.ndarray) -> dict[str, dict[str, int]]:
    """How many nodes of each type ran on each provider, in a prefill and a decode step.

    Args:
        model: an `OnnxModel`; afterwards it keeps the session that was profiled.
        tokens: a prompt, `(1, seq)`.
    """
    with tempfile.TemporaryDirectory() as work:
        model.session = session(model.path, model.provider, Path(work) / "profile")
        _, cache = model.forward(tokens)
        model.forward(tokens[:, :1], cache=cache)
        events = json.loads(Path(model.session.end_profiling()).read_text())
    return counted(events)


def counted(events: list[dict]) -> dict[str, dict[str, int]]:
    """Count a profile's nodes by provider and type; a node that ran several times counts once."""
    nodes = {
        (event["args"]["provider"], event["args"]["op_name"], event["name"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    counts: dict[str, Counter] = {}
    for provider, kind, _ in nodes:
        counts.setdefault(provider, Counter())[kind] += 1
    return {provider: dict(each.most_common()) for provider, each in counts.items()}
