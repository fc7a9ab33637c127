"""The arms of a comparison: the base, and one or more loops of it, which are all one model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopexport.base.auto_class import auto_class
from loopexport.base.checkpoint import CONFIG, read_config
from loopexport.base.families import is_multimodal
from loopexport.choices import Backend
from loopexport.errors import EvaluationError, one_line
from loopexport.loop.spec import LoopSpec

from .prefix import SharedPrefix
from .tasks import quiet_harness

BASE = "base"
ACCELERATOR_BATCH, CPU_BATCH = 64, 8  # where `--batch-size auto` starts


@dataclass(frozen=True)
class Arm:
    """One of the models that answer the items.

    Attributes:
        name: unique in a comparison; "base" is the base.
        spec: the loop; the base's has K = 1, which is the base bit for bit.
    """

    name: str
    spec: LoopSpec

    @property
    def key(self) -> str:
        """What distinguishes its answers from those of other arms of the same model."""
        return BASE if self.name == BASE else json.dumps(self.spec.to_config_fields(), sort_keys=True)


def base_arm(spec: LoopSpec) -> Arm:
    """The base of a loop. It takes the loop's span, since every span has to exist and be of attention layers."""
    return Arm(BASE, LoopSpec(span=spec.span, steps=1, path=spec.path))


@dataclass
class Model:
    """The model of lm-evaluation-harness that every arm uses; see `load_model`.

    Attributes:
        root: a directory that loads as an export.
        backend: "hf", which holds one model for all arms, or "vllm", which loads an engine for each.
        settings: keywords for the model class of lm-evaluation-harness.
        batch_size: how many rows a forward has; halved when memory runs out.
        lm: the model; with vllm, that of the latest arm.
        prefix: what the arms share of their forwards; None if each runs all of its layers.
    """

    root: Path
    backend: Backend
    settings: dict[str, Any]
    batch_size: int
    lm: Any = field(default=None, repr=False)
    prefix: SharedPrefix | None = None
    _arm: Arm | None = field(default=None, repr=False)

    @property
    def is_costly_to_switch(self) -> bool:
        """Whether each arm has to be loaded; then all items of one arm come before those of the next."""
        return self.backend == "vllm"

    def use(self, arm: Arm) -> Any:
        """The model of lm-evaluation-harness as this arm."""
        if self.lm is None or (self.is_costly_to_switch and arm != self._arm):
            self._load(arm)
        if self.backend == "hf":
            for name, value in arm.spec.to_config_fields().items():
                setattr(self.lm.model.config, name, value)
            self.lm.batch_size_per_gpu = self.batch_size
        self._arm = arm
        return self.lm

    def _load(self, arm: Arm) -> None:
        self.lm = None  # free the engine of the last arm first
        with quiet_harness(), _explained(self.root):
            own = {"hf_overrides": arm.spec.to_config_fields()} if self.backend == "vllm" else {}
            values = {"pretrained": str(self.root), "trust_remote_code": True, **self.settings, **own}
            self.lm = self._model_class().create_from_arg_obj(values, {"batch_size": self.batch_size})
        _share_items(self.lm)

    def _model_class(self) -> Any:
        """The model class of lm-evaluation-harness, which by itself loads language models alone and overlooks NaN."""
        from lm_eval.api.registry import get_model

        from .nan_text import with_nan_noted

        harness: Any = get_model(self.backend)
        if self.backend == "vllm":
            return harness
        config = read_config(self.root / CONFIG)
        kind = {"AUTO_MODEL_CLASS": auto_class(config)} if is_multimodal(config) else {}
        return type(harness.__name__, (with_nan_noted(harness),), kind)

    def halve(self) -> None:
        """Halve the batch after memory ran out.

        Raises:
            EvaluationError: there is nothing to halve.
        """
        if self.batch_size <= 1:
            raise EvaluationError("memory ran out with one item in a batch; use a smaller dtype or a larger device")
        self.batch_size //= 2

    @contextmanager
    def other_batch_size(self) -> Iterator[int]:
        """Another batch size, to find out how much that alone changes."""
        kept = self.batch_size
        self.batch_size = kept // 2 or 2
        try:
            yield self.batch_size
        finally:
            self.batch_size = kept


def _share_items(lm: Any) -> None:
    """Let processes on CPUs share the items too; lm-evaluation-harness does so among GPUs alone."""
    accelerator = getattr(lm, "accelerator", None)
    if accelerator is not None and lm.world_size < accelerator.num_processes:
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:  # whatever transformers or vLLM raise for a model that they cannot load
        remedy = "; a base without a tokenizer needs --model-args tokenizer=DIR" if "tokenizer" in str(error) else ""
        text = f"{type(error).__name__}: {one_line(error, 300)}{remedy}"
        raise EvaluationError(f"cannot load {root.name}: {text}") from error


def start_batch(batch_size: str | int, device: str) -> int:
    """The first batch size: the user's, or for "auto" one that memory allows in most cases.

    Raises:
        EvaluationError: it is neither "auto" nor a positive number.
    """
    if batch_size == "auto":
        return CPU_BATCH if device == "cpu" else ACCELERATOR_BATCH
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise EvaluationError(f"batch size {batch_size!r} must be auto or a number of at least 1")
    return int(batch_size)


def default_device() -> str:
    """The device to compute on: an accelerator if torch finds one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host."""
    import torch

    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )
