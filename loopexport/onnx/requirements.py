"""Which packages ONNX export needs, and which releases of them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from loopexport.errors import OnnxError
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.graph.releases import OLDEST, Newer, newer_parts, release_text


def check_installed() -> None:
    """Raise OnnxError unless the required packages are installed."""
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise OnnxError(f"{missing[0]} is not installed; run `pip install loopexport[onnx]` (or [onnx-cuda])")
    release = _release("transformers")
    if release and release < (5,):
        raise OnnxError(f"ONNX export needs transformers 5 or newer, not {version('transformers')}")
    for name in ("onnxruntime", "onnxruntime-gpu"):
        release = _release(name)
        if release and release < OLDEST:
            raise OnnxError(
                f"{name} {version(name)} loads a weight once for each place that reads it, or computes attention "
                f"wrongly; install {release_text(OLDEST)} or newer"
            )


def newer_parts_of(specs: tuple[LoopSpec, ...], attention: str, whole_experts: bool) -> list[Newer]:
    """The parts of some graph that need a newer onnxruntime, the newest first; see `min_onnxruntime`."""
    found = {each for spec in specs for each in newer_parts(spec, attention, whole_experts)}
    return sorted(found, key=lambda each: each.release, reverse=True)


def check_releases(parts: list[Newer]) -> None:
    """Check that the installed ONNX Runtime runs these parts; some releases crash instead of refusing them."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        release = _release(name)
        for part in parts:
            if release and release < part.release:
                raise OnnxError(
                    f"{name} {version(name)} cannot run {part.part}; install {release_text(part.release)} or newer, "
                    f"or use {part.without}"
                )


def _release(package: str) -> tuple[int, ...] | None:
    """`(major, minor, patch)` of an installed package; None if it is not installed or has no metadata."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])
    except PackageNotFoundError:
        return None
