"""An independent implementation of a path through the layers of a plain model; no code of the template.

Like `support.oracle`, it has no cache: for every chunk it runs the whole sequence so far again, visit by visit, and
overwrites rows of the outputs of the K and V projections. The first visit of a layer is its natural pass. A later visit
sees

    past rows         shared, reference: natural;    per_step: of the same visit, when the row was computed
    rows of the chunk shared: natural;               per_step, reference: its own
"""

from __future__ import annotations

import torch

from support.oracle import Oracle


class PathOracle(Oracle):
    """Runs tokens through a plain model along a path, chunk by chunk.

    Args:
        model: a plain decoder in eval mode.
        path: half-open ranges of layers.
        kv, decode: the K/V policy; "full", or "bypass" for decode steps that visit each layer once.
    """

    def __init__(self, model, path, kv="per_step", decode="full"):
        super().__init__(model, span=(0, 1), steps=2, kv=kv)
        self.visits = [number for start, stop in path for number in range(start, stop)]
        self.decode = decode
        self.bodies = [[len(self.layers) - 1]]  # `_finish` goes on after the last layer

    def logits(self, tokens, chunks, attention_mask=None):
        """Logits of all rows, `(batch, sum(chunks), vocab)`, each row computed with its chunk."""
        entered = [None] * (len(self.visits) + 1)  # by visit: the rows of hidden states that enter it
        own_kv = [None] * len(self.visits)  # by visit: its rows of keys and values
        rows, logits = 0, []
        for length in chunks:
            skips = self.decode == "bypass" and length == 1 and rows > 0
            end = rows + length
            mask = None if attention_mask is None else attention_mask[:, :end]
            h, calls = self._inputs(tokens[:, :end], mask, 0)
            new, natural = h[:, rows:], {}
            for place, number in enumerate(self.visits):
                entered[place] = _joined(entered[place], new)
                is_first = number not in self.visits[:place]
                new, kv = self._visit(number, entered[place], calls, rows, None if is_first else natural, own_kv[place])
                natural.setdefault(number, kv)
                if skips and not is_first:
                    kv, new = natural[number], entered[place][:, rows:]
                kept = [each[:, rows:] for each in kv]
                own_kv[place] = [_joined(*pair) for pair in zip(own_kv[place] or [None] * len(kept), kept, strict=True)]
            entered[-1] = _joined(entered[-1], new)
            logits.append(self._finish(tokens[:, :end], mask, entered[-1])[:, rows:])
            rows = end
        return torch.cat(logits, dim=1)

    def _visit(self, number, h, calls, rows, natural, past):
        """The new rows that a visit returns, and its keys and values, of all rows."""
        seen = {}

        def force(layer, own):
            if natural is None or self.kv == "shared":
                return own if natural is None else natural[number]
            before = natural[number] if self.kv == "reference" else past or [each[:, :0] for each in own]
            return [torch.cat([old[:, :rows], new[:, rows:]], dim=1) for old, new in zip(before, own, strict=True)]

        output = self._run([number], h, calls, seen, force)
        return output[:, rows:], seen[number]


def _joined(past, new):
    return new if past is None else torch.cat([past, new], dim=1)
