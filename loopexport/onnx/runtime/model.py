"""Run an ONNX graph with ONNX Runtime: logits, a cache that stays on the device, and generation."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loopexport._keywords import suggest_keywords
from loopexport.choices import FinishReason, Provider
from loopexport.errors import OnnxError, OnnxInputError, one_line
from loopexport.export.stale_graphs import refuse_stale

from .cache import CacheSlots, OnnxCache, Storage
from .directory import find_end_tokens, find_graph, read_config
from .generation import OwnLengthRows, PaddedRows
from .inputs import (
    check_cache,
    check_earlier_fused,
    check_fused,
    check_no_empty_row,
    check_positions,
    checked_ids,
    checked_mask,
    positions_of,
)
from .prefill import Cuts, find_cuts
from .prompts import encode, load_tokenizer
from .sampling import Sampling
from .session import MAX_REASON_CHARS, load_session, provider_of
from .streamed_text import StreamedText

NUM_LOGITS = "num_logits_to_keep"


class OnnxModel:
    """An ONNX graph, loaded in ONNX Runtime.

    Example:
        >>> model = OnnxModel("qwen3-4b-looped")  # doctest: +SKIP
        >>> print(model.answer("What is the capital of France?"))  # doctest: +SKIP

    Args:
        root: a directory with an ONNX export.
        file: the graph; None for `model.onnx`, the graph of the export's own K, or for the only graph.
        provider: "cuda", "cpu", or "auto" for CUDA if it works; a warning says if it is installed and does not.
        threads: number of CPU threads; None lets ONNX Runtime choose.

    Raises:
        OnnxError: there is no graph, its loop differs from `config.json`, or ONNX Runtime cannot run it there.

    Attributes:
        provider: where it runs, "cuda" or "cpu".
        max_positions: the size of the model's table of positions; None if it has no table.
        vocab_size: number of token ids; None if the graph does not say.
        slots: the graph's cache slots.
    """

    @suggest_keywords
    def __init__(
        self,
        root: str | Path,
        file: str | None = None,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.path = find_graph(self.root, file)
        self.session = load_session(self.path, provider, threads)
        self.provider: Provider = provider_of(self.session)
        inputs = (*self.session.get_inputs(), *self.session.get_overridable_initializers())
        self._inputs = {each.name for each in inputs}
        metadata = self.session.get_modelmeta().custom_metadata_map
        refuse_stale(self.path, metadata)
        self._metadata = metadata
        self._is_fused = metadata.get("attention") == "gqa"
        self.slots = CacheSlots(self.session, self.provider, self._is_fused and not _joins_past(metadata))
        self._recomputed_beyond = int(metadata.get("recomputed_beyond", 0))
        self.max_positions = int(metadata["max_positions"]) if "max_positions" in metadata else None
        (size,) = (each.shape[-1] for each in self.session.get_outputs() if each.name == "logits")
        self.vocab_size: int | None = size if isinstance(size, int) else None

    @cached_property
    def tokenizer(self):
        """The export's tokenizer. Code in the directory is not run."""
        return load_tokenizer(self.root)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer. As in transformers, `config.json` counts only without `generation_config.json`."""
        return find_end_tokens(self.root)

    @cached_property
    def cuts(self) -> Cuts:
        """Where prompts may be cut."""
        return find_cuts(read_config(self.root), self._metadata)

    def empty_cache(self, batch: int) -> OnnxCache:
        """A cache without tokens."""
        return OnnxCache(self.slots.allocated(batch, 0), 0)

    def forward(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        cache: OnnxCache | None = None,
        *,
        num_logits: int | None = None,
    ) -> tuple[np.ndarray, OnnxCache]:
        """Run the graph on the next tokens.

        Args:
            input_ids: `(batch, seq)`.
            attention_mask: `(batch, cached + seq)`, 0 for padding; None for no padding.
            cache: the cache of the earlier tokens; None if there are none. It stays valid.
            num_logits: number of last positions to return logits of; None for all.

        Returns:
            The logits `(batch, seq or num_logits, vocab)` in fp32, and the new cache.

        Raises:
            OnnxInputError: the inputs do not fit each other or the graph; the message says what fits.
        """
        input_ids = checked_ids(input_ids, self.vocab_size)
        batch, length = input_ids.shape
        cache = cache or self.empty_cache(batch)
        total = cache.length + length
        mask = checked_mask(attention_mask, (batch, total))
        check_cache(cache, self.slots.layout, batch)
        if num_logits is not None and not 1 <= num_logits <= length:
            raise OnnxInputError(f"num_logits {num_logits} must be 1 to {length}, the number of tokens; None is all")
        check_positions(total, self.max_positions)
        if self._is_fused:
            check_fused(mask, cache.length, length)
        if self.slots.in_place:
            cache = self.slots.with_room(cache, total)
        target = cache.storage if self.slots.in_place else None
        return self.run(input_ids, mask, cache, target=target, num_logits=num_logits or 0)

    def run(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        cache: OnnxCache,
        *,
        positions: np.ndarray | None = None,
        target: Storage | None,
        row: int | None = None,
        num_logits: int,
    ) -> tuple[np.ndarray, OnnxCache]:
        """Run the graph on inputs that are known to be right; `forward` checks them.

        Args:
            ids: the new tokens, `(batch, seq)`.
            mask: `(batch, cached + seq)`.
            cache: the cache, with room for the new tokens if the graph adds to it in place.
            positions: of the new tokens, `(batch, seq)`; None computes them from the mask.
            target: where the new cache goes; None lets ONNX Runtime allocate it.
            row: the only row of the cache to run; None for all.
            num_logits: number of last positions to return logits of; 0 for all.

        Returns:
            The logits in fp32, and the new cache.
        """
        positions = positions_of(mask, ids.shape[1]) if positions is None else positions
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, NUM_LOGITS: np.array(num_logits)}
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, _tensor(value))
        self.slots.bind_past(binding, cache, row)
        binding.bind_output("logits", "cpu")
        self.slots.bind_present(binding, target, mask.shape[1], row)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has no public error class of its own
            raise OnnxError(f"ONNX Runtime cannot run {self.path}: {one_line(error, MAX_REASON_CHARS)}") from None
        outputs = binding.get_outputs()
        logits = outputs[0].numpy().astype(np.float32, copy=False)[:, -num_logits:]
        if target is None:
            target = self.slots.storage(dict(zip(self.slots.names, outputs[1:], strict=True)))
        target.filled = mask.shape[1]
        return logits, OnnxCache(target, mask.shape[1])

    @suggest_keywords
    def stream(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
    ) -> Generator[np.ndarray, None, FinishReason]:
        """Generate: yield the next token of every row, `(batch,)`. A row that has ended repeats its last token.

        The generator returns why it ended: "end" (an end token in every row), "length" (`max_new_tokens`), or
        "positions" (the table of positions is full).

        Args:
            input_ids: `(batch, seq)`. Pad prompts of different lengths on either side, and give the mask.
            attention_mask: `(batch, seq)`, 0 for padding; None for no padding.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.
            prefill_chunk: number of positions of a prompt to run at once, 2 or more; None chooses it.

        Raises:
            OnnxInputError: an input is not allowed; the message says what is.
        """
        if max_new_tokens < 1:
            raise OnnxInputError(f"max_new_tokens {max_new_tokens} must be 1 or more")
        ids = checked_ids(input_ids, self.vocab_size)
        mask = checked_mask(attention_mask, ids.shape)
        check_no_empty_row(mask)
        check_positions(ids.shape[1], self.max_positions)
        limit: FinishReason = "length"
        room = max_new_tokens if self.max_positions is None else max(1, self.max_positions - ids.shape[1] + 1)
        if room < max_new_tokens:  # the last new token is not run, so it needs no position
            max_new_tokens, limit = room, "positions"
        ends = np.array(self.eos_token_ids if eos_token_ids is None else eos_token_ids, dtype=np.int64)
        self.cuts.parts(ids.shape[1], len(ids), prefill_chunk)  # raises now, and not when the first token is asked for
        rows = self._rows(ids, mask, prefill_chunk)
        return self._stream(rows, (max_new_tokens, limit), sampling or Sampling(), ends)

    def _rows(self, ids: np.ndarray, mask: np.ndarray, chunk: int | None) -> PaddedRows | OwnLengthRows:
        if self.slots.in_place:
            return OwnLengthRows(self, ids, mask, chunk)
        if self._is_fused:
            check_earlier_fused(mask)
            # With a cache, the kernel takes several tokens of a single row only.
            chunk = chunk if len(ids) == 1 else max(2, ids.shape[1])
        return PaddedRows(self, ids, mask, chunk)

    def _stream(
        self,
        rows: PaddedRows | OwnLengthRows,
        limit: tuple[int, FinishReason],
        sampling: Sampling,
        ends: np.ndarray,
    ) -> Generator[np.ndarray, None, FinishReason]:
        random = np.random.default_rng(sampling.seed)
        logits = rows.run_all()
        tokens = sampling.choose(logits, random)
        ended = np.zeros(len(tokens), bool)
        for number in range(1, limit[0] + 1):
            yield tokens
            ended |= np.isin(tokens, ends)
            if ended.all():
                return "end"
            if number == limit[0]:
                break
            # At this length, the cached keys have other rotary frequencies than the next tokens.
            is_stale = rows.length <= self._recomputed_beyond < rows.length + 1
            logits = rows.run_next(tokens, is_stale)
            tokens = np.where(ended, tokens, sampling.choose(logits, random))
        return limit[1]

    @suggest_keywords
    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
    ) -> np.ndarray:
        """Generate the new tokens `(batch, new)`.

        Args:
            input_ids: `(batch, seq)`. Pad prompts of different lengths on either side, and give the mask.
            attention_mask: `(batch, seq)`, 0 for padding; None for no padding.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.
            prefill_chunk: number of positions of a prompt to run at once, 2 or more; None chooses it.

        Raises:
            OnnxInputError: an input is not allowed; the message says what is.
        """
        tokens = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_ids=eos_token_ids,
            prefill_chunk=prefill_chunk,
        )
        return np.stack(list(tokens), axis=1)

    @suggest_keywords
    def stream_text(
        self,
        prompt: str,
        *,
        chat: bool | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
    ) -> Generator[str, None, FinishReason]:
        """Continue a prompt: yield the text piece by piece; the generator returns what that of `stream` returns.

        Args:
            prompt: a question, or text to continue.
            chat: use the chat template; None uses it if there is one.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.
            prefill_chunk: number of positions of a prompt to run at once, 2 or more; None chooses it.

        Raises:
            OnnxError: there is no tokenizer, or no chat template.
            OnnxInputError: an input is not allowed; the message says what is.
        """
        ids = self.encode(prompt, chat=chat)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling,
            "eos_token_ids": eos_token_ids,
            "prefill_chunk": prefill_chunk,
        }
        reason: FinishReason = "end"

        def stream():
            nonlocal reason
            reason = yield from self.stream(ids, **options)

        text = StreamedText(self.tokenizer)
        for token in stream():
            piece = text.add(int(token[0]))
            if piece:
                yield piece
        rest = text.end()
        if rest:
            yield rest
        return reason

    @suggest_keywords
    def answer(
        self,
        prompt: str,
        *,
        chat: bool | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
    ) -> str:
        """Continue a prompt: the whole text.

        Args:
            prompt: a question, or text to continue.
            chat: use the chat template; None uses it if there is one.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.
            prefill_chunk: number of positions of a prompt to run at once, 2 or more; None chooses it.

        Raises:
            OnnxError: there is no tokenizer, or no chat template.
            OnnxInputError: an input is not allowed; the message says what is.
        """
        pieces = self.stream_text(
            prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_ids=eos_token_ids,
            prefill_chunk=prefill_chunk,
        )
        return "".join(pieces)

    def encode(self, prompt: str, *, chat: bool | None = None) -> np.ndarray:
        """Token ids `(1, seq)` of a prompt; `chat` uses the chat template, None if there is one."""
        return np.array([encode(self.tokenizer, prompt, chat, self.root)])


def _joins_past(metadata: dict[str, str]) -> bool:
    """Whether a gqa graph joins past and new keys itself, too: then past and present cannot be the same memory.

    Some graphs of earlier versions do. They do not name the onnxruntime that they need.
    """
    is_earlier = "min_onnxruntime" not in metadata
    return is_earlier and metadata.get("loop_decode") == '"bypass"' and metadata.get("loop_kv") == '"per_step"'


def _tensor(array: np.ndarray):
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.require(array, requirements="C"))
