"""Translate an exported torch program into an ONNX graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch

OPSET = 23


def translate(program) -> ir.Model:
    """The program of `torch.export` as a graph, not yet optimised."""
    from .arithmetic import TRANSLATIONS

    with _quiet():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert translated is not None
    return translated.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch: it warns about operators of packages that are not installed, and about its own plans."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
