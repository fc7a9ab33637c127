"""Where a prompt may be cut, so that its attention does not grow with the square of its length.

The parts run one after another on one cache and give what the whole prompt gives, with these exceptions:

anderson            the rule fits one mix to all tokens of a run
rope type dynamic   each length has frequencies of its own
rope type longrope  there are two sets of frequencies: the first part must be long enough for the second set
decode bypass       a part of one token would be taken for a decode step
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loopexport.errors import OnnxInputError

AUTOMATIC_TOKENS = 512  # in a run, of all rows together
_LEAST_TOKENS = 64  # of a row


@dataclass(frozen=True)
class Cuts:
    """Where the prompts of a graph may be cut.

    Attributes:
        refusal: why they may not be cut; empty if they may.
        first: where a prompt is longer than this, its first part is longer too; None for no such length.
    """

    refusal: str = ""
    first: int | None = None

    def parts(self, length: int, batch: int, chunk: int | None) -> list[tuple[int, int]]:
        """Half-open ranges of the positions to run at once.

        Args:
            length: of the prompt.
            batch: number of rows.
            chunk: the number of positions at once; None chooses it.

        Raises:
            OnnxInputError: the chunk is too small, or prompts may not be cut.
        """
        if chunk is not None and chunk < 2:
            raise OnnxInputError(f"prefill_chunk {chunk} must be 2 or more")
        if self.refusal and chunk is not None and chunk < length:
            raise OnnxInputError(f"prefill_chunk {chunk}: a prompt of this graph is run whole, because {self.refusal}")
        if self.refusal:
            return [(0, length)]
        step = chunk or max(_LEAST_TOKENS, AUTOMATIC_TOKENS // batch)
        first = (self.first or 0) + 1 if self.is_beyond_first(length) else 0
        ends = list(range(max(step, first), length, step))
        if ends and length - ends[-1] == 1:  # one token alone is a decode step to a graph with decode bypass
            ends.pop()
        return list(zip([0, *ends], [*ends, length], strict=True))

    def is_beyond_first(self, length: int) -> bool:
        """Whether a prompt is so long that its rotary frequencies are the other set."""
        return self.first is not None and self.first < length


def find_cuts(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Cuts:
    """Where prompts may be cut, from `config.json` and the graph's metadata."""
    if metadata.get("loop_rule") == '"anderson"' and metadata.get("loop_steps") != "1":
        return Cuts("rule anderson fits one mix to all tokens of a run")
    limits = []
    for rope in _ropes(config):
        kind = str(rope.get("rope_type") or rope.get("type"))
        if "dynamic" in kind:
            return Cuts("its rotary frequencies depend on the length")
        if kind == "longrope":
            names = "original_max_position_embeddings", "max_position_embeddings"
            limits += [each[name] for name in names for each in (rope, config) if isinstance(each.get(name), int)][:1]
    return Cuts(first=max(limits, default=None))


def _ropes(value: Any) -> Iterator[Mapping[str, Any]]:
    """The descriptions of rotary embeddings in a config, at any depth."""
    if isinstance(value, Mapping):
        if "rope_type" in value or "type" in value:
            yield value
        for each in value.values():
            yield from _ropes(each)
