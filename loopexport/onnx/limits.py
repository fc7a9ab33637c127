"""Loops that no single graph can run, told from the spec alone."""

from __future__ import annotations

from loopexport.errors import OnnxError
from loopexport.spec import LoopSpec


def check_spec(spec: LoopSpec) -> None:
    """Check that one graph can do what a spec asks for.

    Raises:
        OnnxError: it cannot; the message says why, and what can be done.
    """
    if not spec.is_identity and spec.decode == "first_n":
        raise OnnxError(
            "decode first_n counts decode steps, of which a graph is told nothing: set loop_decode to full or bypass "
            "in config.json, or export the base with --steps 1"
        )
