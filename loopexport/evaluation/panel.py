"""A model of lm-evaluation-harness that stands for all arms: each slab of requests is answered by every arm in turn.

lm-evaluation-harness asks a model for all answers at once. A `Panel` answers for one arm and keeps what the others
answered, so that all arms see the same requests, in the same order and the same batches, on one load of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from loopexport.errors import EvaluationError, one_line

from .arms import Arm, Model, is_out_of_memory
from .journal import Entry, Journal, entry_key

GENERATION = "generate_until"
SLAB_BATCHES = 32  # batches in a slab: many, since a batch has less padding where there are more to sort

Progress = Callable[[int, int], None]


class Panel(LM):
    """The arms of a comparison, as one model of lm-evaluation-harness.

    Args:
        model: the model in memory.
        arms: they answer in this order.
        journal: where the answers are kept.
        seed: of sampled generation; all arms get the same.
        progress: called with the numbers of answers given, and to give, of the requests at hand.
    """

    def __init__(
        self,
        model: Model,
        arms: Sequence[Arm],
        journal: Journal,
        *,
        seed: int,
        progress: Progress = lambda done, total: None,
    ):
        super().__init__()
        self.model, self.arms, self.journal, self.seed, self.progress = model, tuple(arms), journal, seed, progress
        self.seconds = dict.fromkeys((arm.name for arm in arms), 0.0)
        self.speaker = self.arms[0]
        model.use(self.arms[0])
        self._known: dict[str, dict[str, list]] = {}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, in nats, by the current arm."""
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood of each text, in nats, by the current arm."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text that the current arm generates for each request."""
        return self._answer(GENERATION, requests)

    def _answer(self, kind: str, requests: list[Instance]) -> list:
        key = entry_key("", kind, self.seed, [each.args for each in requests])
        if key not in self._known:
            self._known[key] = self._ask_all(kind, requests)
        return self._known[key][self.speaker.name]

    def _ask_all(self, kind: str, requests: list[Instance]) -> dict[str, list]:
        """The answers of every arm to all requests, in the order of the requests."""
        answers: dict[str, list] = {arm.name: [None] * len(requests) for arm in self.arms}
        done, total = 0, len(requests) * len(self.arms)
        slabs = list(self._slabs(kind, requests))
        for arms, slab in self._schedule(slabs):
            entries = self._ask(arms, kind, [requests[position] for position in slab])
            for arm, entry in zip(arms, entries, strict=True):
                self.seconds[arm.name] += entry.seconds
                for position, answer in zip(slab, entry.answers, strict=True):
                    answers[arm.name][position] = answer
            done += len(slab) * len(arms)
            self.progress(done, total)
        return answers

    def _schedule(self, slabs: list[list[int]]) -> Iterator[tuple[Sequence[Arm], list[int]]]:
        """Which arms answer which slab: all of them slab by slab, or, where switching is costly, arm by arm."""
        groups = [(arm,) for arm in self.arms] if self.model.is_costly_to_switch else [self.arms]
        return ((arms, slab) for arms in groups for slab in slabs)

    def _slabs(self, kind: str, requests: list[Instance]) -> Iterator[list[int]]:
        """Positions of the requests in slabs, the longest first, so that memory runs out at once if it does.

        Requests with one context stay together, since lm-evaluation-harness runs them as one row.
        """
        order = sorted(range(len(requests)), key=lambda position: _length_key(requests[position]))
        size, slab = self._slab_batches(kind, requests) * self.model.batch_size, []  # type: tuple[int, list[int]]
        for position in order:
            if len(slab) >= size and requests[position].args[0] != requests[slab[-1]].args[0]:
                yield slab
                slab = []
            slab.append(position)
        if slab:
            yield slab

    def _slab_batches(self, kind: str, requests: list[Instance]) -> int:
        """How many batches a slab has; fewer where the arms keep states for each other."""
        if self.model.prefix is None or kind == GENERATION or not requests:
            return SLAB_BATCHES
        longest = max((_text(each) for each in requests), key=len)
        return min(SLAB_BATCHES, self.model.prefix.batches(self._inner, longest, self.model.batch_size))

    def _ask(self, arms: Sequence[Arm], kind: str, requests: list[Instance]) -> list[Entry]:
        """The entries of these arms for one slab, all of one batch size."""
        while True:
            if self.model.prefix is not None:
                self.model.prefix.clear()
            try:
                return [self._ask_one(arm, kind, requests) for arm in arms]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.model.halve()  # and ask all arms again: they must have the same batches

    def _ask_one(self, arm: Arm, kind: str, requests: list[Instance]) -> Entry:
        key = entry_key(arm.key, kind, self.seed, [each.args for each in requests])
        entry = self.journal.find(key, kind, len(requests))
        if entry is not None and entry.batch_size <= self.model.batch_size:
            self.model.batch_size = entry.batch_size
            return entry
        sharing = self._sharing(arm, kind, requests)
        lm, start = self.model.use(arm), time.perf_counter()
        _seed(int(entry_key("", kind, self.seed, [each.args for each in requests])[:8], 16))
        with sharing, _explained(arm):
            answers = getattr(lm, kind)(requests, disable_tqdm=True)
        entry = Entry(key, list(answers), self.model.batch_size, time.perf_counter() - start)
        self.journal.add(entry)
        return entry

    def _sharing(self, arm: Arm, kind: str, requests: list[Instance]) -> AbstractContextManager:
        """Let the forwards of this arm start from what the arms before it computed of the same batches."""
        prefix = self.model.prefix
        if prefix is None or kind == GENERATION:
            return nullcontext()
        prefix.check(self.model, self.arms, [_text(each) for each in requests])
        return prefix.sharing(self._inner.model, arm.spec)

    @contextmanager
    def speaking(self, arm: Arm) -> Iterator[None]:
        """Answer for this arm."""
        before, self.speaker = self.speaker, arm
        try:
            yield
        finally:
            self.speaker = before

    # lm-evaluation-harness asks a model for these too. All arms have the same tokenizer and processes.

    @property
    def _inner(self) -> Any:
        return self.model.lm

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self._inner.rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self._inner.world_size

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, under which prompts are cached."""
        return self._inner.tokenizer_name

    @property
    def device(self) -> Any:
        """The device that the model computes on."""
        return self._inner.device

    def all_gather(self, tensor):
        """The tensors of all processes."""
        return self._inner.all_gather(tensor)

    def gather_object(self, obj, dst: int = 0):
        """The objects of all processes, in process `dst`."""
        return self._inner.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes."""
        self._inner.barrier()

    def apply_chat_template(self, *args, **kwargs) -> str:
        """The chat as text."""
        return self._inner.apply_chat_template(*args, **kwargs)

    def chat_template(self, *args, **kwargs):
        """The chat template."""
        return self._inner.chat_template(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self._inner, name)


@contextmanager
def _explained(arm: Arm) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise EvaluationError(
            f"{arm.name} cannot answer: {one_line(error, 300)}; where numbers overflow (inf, nan), try --dtype float32 "
            "or a milder loop, else another --device or --batch-size"
        ) from error


def _length_key(request: Instance) -> tuple[int, str, str]:
    context, *rest = request.args
    return -len(context), context, str(rest)


def _text(request: Instance) -> str:
    """The text of a request for a log-likelihood."""
    return "".join(request.args)


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
