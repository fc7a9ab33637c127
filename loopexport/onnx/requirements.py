"""Which packages ONNX export needs, and which releases of them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from loopexport.errors import OnnxError
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.graph.releases import OLDEST, min_onnxruntime, release_text


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


def check_releases(specs: tuple[LoopSpec, ...], attention: str) -> None:
    """Check that the installed ONNX Runtime runs the graphs; some releases crash instead of refusing them."""
    needed = needed_release(specs, attention)
    for name in ("onnxruntime", "onnxruntime-gpu"):
        release = _release(name)
        if release and release < needed:
            raise OnnxError(
                f"{name} {version(name)} cannot run a graph of --attention {attention} with kv shared; install "
                f"{release_text(needed)} or newer, or use --attention portable"
            )


def needed_release(specs: tuple[LoopSpec, ...], attention: str) -> tuple[int, ...]:
    """The oldest onnxruntime that runs all graphs."""
    return max(min_onnxruntime(spec, attention) for spec in specs)


def _release(package: str) -> tuple[int, ...] | None:
    """`(major, minor, patch)` of an installed package; None if it is not installed or has no metadata."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])
    except PackageNotFoundError:
        return None
