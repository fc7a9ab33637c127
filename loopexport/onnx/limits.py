"""Loops that no single graph can run, told from the spec alone."""

from __future__ import annotations

from loopexport.errors import OnnxError
from loopexport.spec import LoopSpec


def check_spec(spec: LoopSpec) -> None:
    """Check that one graph can do what a spec asks for.

    Raises:
        OnnxError: it cannot; the message says why, and what can be done.
    """
    if not spec.is_identity and spec.decode != "full":
        raise OnnxError(
            f"decode {spec.decode} runs some decode steps without the loop, which one graph cannot choose: set "
            "loop_decode to full in config.json, or export the base with --steps 1"
        )
