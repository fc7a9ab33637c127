"""What quantising costs: how far a graph's next tokens are from those of the plain model, on a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopexport.errors import OnnxError
from loopexport.export.foreign_text import printable
from loopexport.export.quantisation import Divergence
from loopexport.loop.spec import LoopSpec
from loopexport.onnx.runtime.model import OnnxModel

# The beginning of a book whose copyright has ended everywhere.
PROSE, PROSE_NAME = Path(__file__).with_name("prose.txt"), "The Wind in the Willows (1908)"

WINDOW_TOKENS = 512  # tokens that are run together
_ROWS = 64  # rows of logits that are compared together, which bounds the memory


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    Attributes:
        name: what to call it.
        tokens: `(length,)`.
    """

    name: str
    tokens: np.ndarray


def read_text(model: OnnxModel, path: Path | None) -> Text | str:
    """A text in the tokens of a model; without tokens, why there are none.

    Args:
        model: a graph of the export.
        path: the text; None for LoopExport's own.
    """
    content = (path or PROSE).read_text(encoding="utf-8")
    try:
        ids = model.tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    except OnnxError as error:
        return str(error)
    tokens, name = np.array(ids, dtype=np.int64), PROSE_NAME if path is None else printable(path.name)
    if tokens.size < 2:
        return f"{name} has {tokens.size} tokens, and 2 are needed"
    if model.vocab_size is not None and tokens.max() >= model.vocab_size:
        return "the tokenizer has tokens that the model does not know"
    return Text(name, tokens)


def divergence(graph: OnnxModel, plain: Any, spec: LoopSpec, text: Text) -> Divergence:
    """How far a quantised graph is from the plain model in torch.

    Args:
        graph: the graph, as it runs.
        plain: the export in torch, in fp32; its loop becomes that of the graph.
        spec: the loop of the graph.
        text: what to run.
    """
    _set_loop(plain.config, spec.to_config_fields())
    nats, equal = 0.0, 0
    for ids in _windows(text.tokens, min(WINDOW_TOKENS, graph.max_positions or WINDOW_TOKENS)):
        ours = torch.from_numpy(graph.forward(ids[None])[0][0])
        with torch.no_grad():
            theirs = plain(input_ids=torch.from_numpy(ids[None]), use_cache=False).logits[0].float()
        for rows, expected in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
            log_q, log_p = rows.log_softmax(-1), expected.log_softmax(-1)
            nats += float((log_p.exp() * (log_p - log_q)).sum())
            equal += int((rows.argmax(-1) == expected.argmax(-1)).sum())
    return Divergence(max(nats, 0.0) / text.tokens.size, equal / text.tokens.size)


def _windows(tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for start in range(0, tokens.size, length):
        yield tokens[start : start + length]


def _set_loop(config: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)
