"""Run an ONNX export with ONNX Runtime: logits, a cache that stays on the device, and generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loopexport.errors import OnnxError

from .names import graph_name

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type


@dataclass
class OnnxCache:
    """Keys and values of the tokens so far.

    Attributes:
        values: ONNX Runtime's own tensors by input name; they lie on the session's device.
        length: how many positions they hold.
    """

    values: dict[str, Any]
    length: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability.
        seed: of the random numbers; None for another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise OnnxError(f"temperature {self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise OnnxError(f"top_k {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise OnnxError(f"top_p {self.top_p} must be in (0, 1]")

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A token for each row of `(batch, vocab)`."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return np.array([random.choice(len(row), p=self._probabilities(row)) for row in logits.astype(np.float64)])

    def _probabilities(self, row: np.ndarray) -> np.ndarray:
        row = row / self.temperature
        if 0 < self.top_k < len(row):
            row = np.where(row < np.partition(row, -self.top_k)[-self.top_k], -np.inf, row)
        weights = np.exp(row - row.max())
        probabilities = weights / weights.sum()
        if self.top_p < 1:
            order = np.argsort(-probabilities)
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0
            probabilities /= probabilities.sum()
        return probabilities


class OnnxModel:
    """A graph in a session.

    Example:
        >>> model = OnnxModel("qwen3-4b-looped")  # doctest: +SKIP
        >>> print(model.answer("What is the capital of France?"))  # doctest: +SKIP

    Args:
        root: a directory with an ONNX export.
        file: the graph; None for the only one, or that of the export's own K.
        provider: "cuda", "cpu", or "auto" for CUDA where it is available.
        threads: for the CPU; None leaves it to ONNX Runtime.

    Raises:
        OnnxError: there is no graph, or ONNX Runtime cannot run it.
    """

    def __init__(
        self, root: str | Path, file: str | None = None, *, provider: str = "auto", threads: int | None = None
    ):
        self.root = Path(root).expanduser()
        self.path = self._find(file)
        self.provider = _chosen_provider(provider)
        self.session = _session(self.path, PROVIDERS[self.provider], threads)
        self._inputs = {each.name: each for each in self.session.get_inputs()}
        self._outputs = [each.name for each in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        self._is_fused = metadata.get("attention") == "gqa"
        self._recomputed_beyond = int(metadata.get("recomputed_beyond", 0))

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
            raise OnnxError(f"no ONNX graph in {self.root}; `loopexport onnx {self.root}` makes one")
        raise OnnxError(f"{self.root} has several graphs, choose one: {', '.join(graphs)}")

    @cached_property
    def tokenizer(self):
        """The export's tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.root, trust_remote_code=True)
        except (OSError, ValueError) as error:
            raise OnnxError(f"no tokenizer in {self.root}: {' '.join(str(error).split())[:200]}") from None

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, as the export's configs name them."""
        from loopexport.checkpoint import read_json

        for name in ("generation_config.json", "config.json"):
            if (self.root / name).is_file():
                value = read_json(self.root / name).get("eos_token_id")
                if value is not None:
                    return tuple(value) if isinstance(value, list) else (value,)
        return ()

    def empty_cache(self, batch: int) -> OnnxCache:
        """A cache that holds nothing yet."""
        values = {}
        for name, each in self._inputs.items():
            if name.startswith("past_key_values."):
                shape = [batch, each.shape[1], 0, each.shape[3]]
                values[name] = _empty(shape, each.type, self.provider)
        return OnnxCache(values, 0)

    def forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: OnnxCache | None = None
    ) -> tuple[np.ndarray, OnnxCache]:
        """Logits `(batch, seq, vocab)` in fp32 of the next tokens, and the cache with them in it.

        Args:
            input_ids: `(batch, seq)`.
            attention_mask: `(batch, cached + seq)`, 0 for padding; None for no padding.
            cache: of the tokens before; None for none. It is not changed.
        """
        input_ids = np.ascontiguousarray(input_ids, dtype=np.int64)
        batch, length = input_ids.shape
        cache = cache or self.empty_cache(batch)
        total = cache.length + length
        mask = np.ones((batch, total), np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        if self._is_fused:
            _check_fused(mask, cache.length, length)
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
        self.session.run_with_iobinding(binding)
        outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits = outputs.pop("logits").numpy().astype(np.float32, copy=False)
        values = {name.replace("present.", "past_key_values."): value for name, value in outputs.items()}
        return logits, OnnxCache(values, total)

    def stream(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """Generate, a token for each row at a time, `(batch,)`; a row that has ended goes on with its last token.

        Args:
            input_ids: `(batch, seq)`; prompts of different lengths are padded left or right, told by the mask.
            attention_mask: `(batch, seq)`, 0 for padding.
            max_new_tokens: where to stop at the latest.
            sampling: how tokens are chosen; None is greedily.
            eos_token_ids: tokens that end a row; None for those of the export's configs.
        """
        sampling = sampling or Sampling()
        random = np.random.default_rng(sampling.seed)
        ends = np.array(self.eos_token_ids if eos_token_ids is None else eos_token_ids, dtype=np.int64)
        ids, mask = _padded_left(input_ids, attention_mask)
        cache, tokens, ended = None, None, np.zeros(len(ids), bool)
        all_ids = ids
        for _ in range(max_new_tokens):
            if cache is not None and cache.length <= self._recomputed_beyond < all_ids.shape[1]:
                ids, cache = all_ids, None  # the cached keys are of other frequencies than what follows
            logits, cache = self.forward(ids, mask, cache)
            chosen = sampling.choose(logits[:, -1], random)
            tokens = chosen if tokens is None else np.where(ended, tokens, chosen)
            yield tokens
            ended |= np.isin(tokens, ends)
            if ended.all():
                return
            ids = tokens[:, None]
            all_ids = np.concatenate([all_ids, ids], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)

    def generate(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, **options) -> np.ndarray:
        """The new tokens `(batch, new)`; the options are those of `stream`."""
        return np.stack(list(self.stream(input_ids, attention_mask, **options)), axis=1)

    def stream_text(self, prompt: str, *, chat: bool | None = None, **options) -> Iterator[str]:
        """The continuation of a prompt, piece by piece.

        Args:
            prompt: a question, or text to go on with.
            chat: whether to put it into the chat template; None does where there is one.
            **options: those of `stream`.
        """
        ids = self.encode(prompt, chat=chat)
        tokens: list[int] = []
        shown = ""
        for token in self.stream(ids, **options):
            tokens.append(int(token[0]))
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the first bytes of a character that is not whole yet
                yield text[len(shown) :]
                shown = text

    def answer(self, prompt: str, **options) -> str:
        """The continuation of a prompt; the options are those of `stream_text`."""
        return "".join(self.stream_text(prompt, **options))

    def encode(self, prompt: str, *, chat: bool | None = None) -> np.ndarray:
        """A prompt as token ids `(1, seq)`."""
        has_template = getattr(self.tokenizer, "chat_template", None) is not None
        if chat and not has_template:
            raise OnnxError(f"the tokenizer in {self.root} has no chat template; use --no-chat")
        if has_template and chat is not False:
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            return np.array([self.tokenizer(text, add_special_tokens=False).input_ids])
        return np.array([self.tokenizer(prompt).input_ids])


def _padded_left(ids: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows shifted so that padding comes first: the next token then follows the last of every row."""
    ids = np.asarray(ids, dtype=np.int64)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask, dtype=np.int64)
    if mask.shape != ids.shape:
        raise OnnxError(f"attention_mask {mask.shape} must have the shape of input_ids, {ids.shape}")
    shifts = [int(np.argmax(row[::-1])) for row in mask]
    pairs = [(np.roll(row, by), np.roll(own, by)) for row, own, by in zip(ids, mask, shifts, strict=True)]
    return np.stack([row for row, _ in pairs]), np.stack([own for _, own in pairs])


def _check_fused(mask: np.ndarray, past: int, length: int) -> None:
    """Raise OnnxError where GroupQueryAttention would compute something else without a word."""
    if not mask.all():
        raise OnnxError("a graph of attention gqa takes no padded batch; use one of --attention portable")
    if len(mask) > 1 and past and length > 1:
        raise OnnxError(
            f"a graph of attention gqa takes {length} tokens on a cache for one prompt only, not {len(mask)}; run them "
            "one by one, or use a graph of --attention portable"
        )


def _chosen_provider(provider: str) -> str:
    import onnxruntime

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if provider == "auto":
        return "cuda" if has_cuda else "cpu"
    if provider not in PROVIDERS:
        raise OnnxError(f"provider {provider!r} must be one of auto, {', '.join(PROVIDERS)}")
    if provider == "cuda" and not has_cuda:
        raise OnnxError("ONNX Runtime has no CUDA here; install loopexport[onnx-cuda], or use --provider cpu")
    return provider


def _session(path: Path, providers: list[str], threads: int | None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime has no public error class of its own
        reason = " ".join(str(error).split())[:300]
        if "bfloat16" in reason or "NOT_IMPLEMENTED" in reason:
            reason += "; a graph in bf16 runs on CUDA only: `loopexport onnx --dtype fp32` makes one for the CPU"
        raise OnnxError(f"ONNX Runtime cannot run {path}: {reason}") from None


def _empty(shape: list[int], type_name: str, device: str):
    import onnxruntime

    create = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    return create(shape, _NUMPY.get(type_name, _BFLOAT16), device, 0)


def _listed(root: Path) -> str:
    return ", ".join(sorted(path.name for path in root.glob("*.onnx"))) or "none"
