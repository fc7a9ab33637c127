"""Run an ONNX graph with ONNX Runtime: logits, a cache that stays on the device, and generation."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CONFIG, read_json
from loopexport.choices import FinishReason, Provider
from loopexport.errors import CheckpointError, OnnxError, OnnxInputError, one_line
from loopexport.export.onnx_files import graph_name
from loopexport.export.stale_graphs import refuse_stale
from loopexport.files.links import check_no_special_file

from .inputs import check_fused, checked_mask, padded_left
from .prompts import encode, load_tokenizer
from .sampling import Sampling
from .session import MAX_REASON_CHARS, choose_provider, empty_tensor, load_session


@dataclass
class OnnxCache:
    """Keys and values of the tokens so far.

    Attributes:
        values: ONNX Runtime's tensors by input name, on the session's device.
        length: the number of cached positions.
    """

    values: dict[str, Any]
    length: int


class OnnxModel:
    """An ONNX graph, loaded in ONNX Runtime.

    Example:
        >>> model = OnnxModel("qwen3-4b-looped")  # doctest: +SKIP
        >>> print(model.answer("What is the capital of France?"))  # doctest: +SKIP

    Args:
        root: a directory with an ONNX export.
        file: the graph; None for `model.onnx`, the graph of the export's own K, or for the only graph.
        provider: "cuda", "cpu", or "auto" for CUDA if it is available.
        threads: number of CPU threads; None lets ONNX Runtime choose.

    Raises:
        OnnxError: there is no graph, its loop differs from `config.json`, or ONNX Runtime cannot run it.

    Attributes:
        max_positions: the size of the model's table of positions; None if it has no table.
        vocab_size: number of token ids; None if the graph does not say.
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
        _check_no_special_file(self.root)
        self.path = self._find(file)
        self.provider = choose_provider(provider)
        self.session = load_session(self.path, self.provider, threads)
        self._inputs = {each.name: each for each in self.session.get_inputs()}
        self._outputs = [each.name for each in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        refuse_stale(self.path, metadata)
        self._is_fused = metadata.get("attention") == "gqa"
        self._recomputed_beyond = int(metadata.get("recomputed_beyond", 0))
        self.max_positions = int(metadata["max_positions"]) if "max_positions" in metadata else None
        size = self.session.get_outputs()[self._outputs.index("logits")].shape[-1]
        self.vocab_size: int | None = size if isinstance(size, int) else None

    def _find(self, file: str | None) -> Path:
        if file is not None:
            path = self.root / file
            if path.is_file():
                return path
            raise OnnxError(f"no {file} in {self.root}; there are {_listed(self.root)}")
        graphs = sorted(path.name for path in self.root.glob("*.onnx") if not path.name.startswith("."))
        own = graph_name(1, 1)
        if own in graphs or len(graphs) == 1:
            return self.root / (own if own in graphs else graphs[0])
        if not graphs:
            raise OnnxError(f"no ONNX graph in {self.root}; run `loopexport onnx {self.root}` first")
        raise OnnxError(f"{self.root} has several graphs, choose one: {', '.join(graphs)}")

    @cached_property
    def tokenizer(self):
        """The export's tokenizer. Code in the directory is not run."""
        return load_tokenizer(self.root)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: like transformers, from `generation_config.json` alone if there is one."""
        for name in ("generation_config.json", CONFIG):
            if (self.root / name).is_file():
                value = _read_json(self.root / name).get("eos_token_id")
                return () if value is None else _token_ids(value, self.root / name)
        return ()

    def empty_cache(self, batch: int) -> OnnxCache:
        """A cache without tokens."""
        values = {}
        for name, each in self._inputs.items():
            if name.startswith("past_key_values."):
                shape = [batch, each.shape[1], 0, each.shape[3]]
                values[name] = empty_tensor(shape, each.type, self.provider)
        return OnnxCache(values, 0)

    def forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: OnnxCache | None = None
    ) -> tuple[np.ndarray, OnnxCache]:
        """Run the graph on the next tokens.

        Args:
            input_ids: `(batch, seq)`.
            attention_mask: `(batch, cached + seq)`, 0 for padding; None for no padding.
            cache: the cache of the earlier tokens; None if there are none. It is not changed.

        Returns:
            The logits `(batch, seq, vocab)` in fp32, and the new cache.

        Raises:
            OnnxInputError: the inputs do not fit each other or the graph; the message says what fits.
        """
        input_ids = self._checked_ids(input_ids)
        batch, length = input_ids.shape
        cache = cache or self.empty_cache(batch)
        total = cache.length + length
        mask = checked_mask(attention_mask, (batch, total))
        self._check_cache(cache, batch)
        if self.max_positions is not None and total > self.max_positions:
            raise OnnxInputError(
                f"{total} tokens are more than the {self.max_positions} that the model has positions for"
            )
        if self._is_fused:
            check_fused(mask, cache.length, length)
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -length:]
        feeds = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in cache.values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self.provider)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has no public error class of its own
            raise OnnxError(f"ONNX Runtime cannot run {self.path}: {one_line(error, MAX_REASON_CHARS)}") from None
        outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits = outputs.pop("logits").numpy().astype(np.float32, copy=False)
        values = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
        return logits, OnnxCache(values, total)

    def _checked_ids(self, input_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise OnnxInputError(
                f"input_ids of shape {ids.shape} must be whole numbers (batch, seq), both sizes 1 or more"
            )
        wrong = ids[(ids < 0) | (ids >= (self.vocab_size or np.inf))]
        if wrong.size:
            count = self.vocab_size or "unknown"
            raise OnnxInputError(f"token id {wrong[0]} is not in the model's vocabulary of {count} tokens")
        return np.ascontiguousarray(ids, dtype=np.int64)

    def _check_cache(self, cache: OnnxCache, batch: int) -> None:
        names = {name for name in self._inputs if name.startswith("past_key_values.")}
        if cache.values.keys() != names:
            raise OnnxInputError(
                f"the cache belongs to another graph: it has {len(cache.values)} tensors instead of {len(names)}"
            )
        cached = next(iter(cache.values.values())).shape()[0]
        if cached != batch:
            raise OnnxInputError(
                f"the cache has a batch of {cached}, but input_ids has a batch of {batch}; they must be equal"
            )

    @suggest_keywords
    def stream(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
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

        Raises:
            OnnxInputError: an input is not allowed; the message says what is.
        """
        if max_new_tokens < 1:
            raise OnnxInputError(f"max_new_tokens {max_new_tokens} must be 1 or more")
        ids = self._checked_ids(input_ids)
        mask = checked_mask(attention_mask, ids.shape)
        empty = np.flatnonzero(~mask.any(axis=1))
        if empty.size:
            raise OnnxInputError(f"row {empty[0]} of attention_mask is all padding; it needs at least one token")
        limit: FinishReason = "length"
        room = max_new_tokens if self.max_positions is None else max(1, self.max_positions - ids.shape[1] + 1)
        if room < max_new_tokens:  # the last new token is not run, so it needs no position
            max_new_tokens, limit = room, "positions"
        ends = np.array(self.eos_token_ids if eos_token_ids is None else eos_token_ids, dtype=np.int64)
        return self._stream(*padded_left(ids, mask), (max_new_tokens, limit), sampling or Sampling(), ends)

    def _stream(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        limit: tuple[int, FinishReason],
        sampling: Sampling,
        ends: np.ndarray,
    ) -> Generator[np.ndarray, None, FinishReason]:
        random = np.random.default_rng(sampling.seed)
        cache, tokens, ended = None, None, np.zeros(len(ids), bool)
        all_ids = ids
        for _ in range(limit[0]):
            if cache is not None and cache.length <= self._recomputed_beyond < all_ids.shape[1]:
                ids, cache = all_ids, None  # the cached keys have other rotary frequencies than the next tokens
            logits, cache = self.forward(ids, mask, cache)
            chosen = sampling.choose(logits[:, -1], random)
            tokens = chosen if tokens is None else np.where(ended, tokens, chosen)
            yield tokens
            ended |= np.isin(tokens, ends)
            if ended.all():
                return "end"
            ids = tokens[:, None]
            all_ids = np.concatenate([all_ids, ids], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
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
    ) -> np.ndarray:
        """Generate the new tokens `(batch, new)`.

        Args:
            input_ids: `(batch, seq)`. Pad prompts of different lengths on either side, and give the mask.
            attention_mask: `(batch, seq)`, 0 for padding; None for no padding.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.

        Raises:
            OnnxInputError: an input is not allowed; the message says what is.
        """
        tokens = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_ids=eos_token_ids,
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
    ) -> Generator[str, None, FinishReason]:
        """Continue a prompt: yield the text piece by piece; the generator returns what that of `stream` returns.

        Args:
            prompt: a question, or text to continue.
            chat: use the chat template; None uses it if there is one.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.

        Raises:
            OnnxError: there is no tokenizer, or no chat template.
            OnnxInputError: an input is not allowed; the message says what is.
        """
        ids = self.encode(prompt, chat=chat)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling,
            "eos_token_ids": eos_token_ids,
        }
        reason: FinishReason = "end"

        def stream():
            nonlocal reason
            reason = yield from self.stream(ids, **options)

        tokens: list[int] = []
        shown = text = ""
        for token in stream():
            tokens.append(int(token[0]))
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the first bytes of an incomplete character
                yield text[len(shown) :]
                shown = text
        if len(text) > len(shown):  # a character that stayed incomplete
            yield text[len(shown) :]
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
    ) -> str:
        """Continue a prompt: the whole text.

        Args:
            prompt: a question, or text to continue.
            chat: use the chat template; None uses it if there is one.
            max_new_tokens: stop after this many tokens; a full table of positions stops earlier.
            sampling: how to choose tokens; None for greedy.
            eos_token_ids: tokens that end a row; None for the export's own.

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
        )
        return "".join(pieces)

    def encode(self, prompt: str, *, chat: bool | None = None) -> np.ndarray:
        """Token ids `(1, seq)` of a prompt; `chat` uses the chat template, None if there is one."""
        return np.array([encode(self.tokenizer, prompt, chat, self.root)])


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise OnnxError(str(error)) from None


def _check_no_special_file(root: Path) -> None:
    try:
        check_no_special_file(root)
    except CheckpointError as error:
        raise OnnxError(str(error)) from None


def _token_ids(value, path: Path) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(each, int) for each in ids):
        raise OnnxError(f"{path} has eos_token_id {value!r}, which is neither a token id nor a list of token ids")
    return ids


def _listed(root: Path) -> str:
    return ", ".join(sorted(path.name for path in root.glob("*.onnx"))) or "none"
