"""Ask the arms, score their answers, and pair those of each loop with those of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any

from loopexport.errors import EvaluationError

from .arms import Arm, Model
from .effects import check_effects
from .items import Answer, Pair
from .journal import Journal
from .noise import Floor, measure_floor
from .panel import Panel
from .scoring import Metric, answer_of, choose_metric, of_metric, pair_up, score
from .tasks import Prompting
from .verdicts import compare_pairs

FLOOR_SHARE, MIN_FLOOR_ITEMS, MAX_FLOOR_ITEMS = 0.02, 8, 64  # of each task

Progress = Callable[[int, int], None]
Items = dict[str, list[int]]


class Measurement:
    """A base and its loops on the tasks of one run.

    Args:
        model: the model of all arms.
        journal: where the answers are kept.
        tasks: as `TaskSource.load` gives them.
        prompting: how to ask.
        metric: the user's choice of a metric, or None.
        progress: called with the numbers of answers given, and to give, of the requests at hand.

    Attributes:
        seconds: for each arm, how long it took, without loading.
    """

    def __init__(
        self,
        model: Model,
        journal: Journal,
        tasks: dict,
        prompting: Prompting,
        metric: str | None = None,
        progress: Progress = lambda done, total: None,
    ):
        self.model, self.journal, self.tasks, self.prompting = model, journal, tasks, prompting
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._wanted_metric = metric
        self._metrics: dict[str, Metric] = {}

    def pairs(
        self, base: Arm, loops: Sequence[Arm], seeds: Sequence[int], items: Items | None = None
    ) -> dict[str, list[Pair]]:
        """For each loop, by name, its pairs with the base on all tasks.

        Args:
            base, loops: the arms; all of them answer the same requests in the same batches.
            seeds: of sampled generation. Tasks that do not sample are asked with the first one alone.
            items: for each task, the numbers of its items to use; None for all.

        Returns:
            Empty in every process but the first.

        Raises:
            EvaluationError: a task cannot be asked or scored, several seeds were given and no task samples, or another
                option would have no effect. All of that shows before the first arm answers all items.
        """
        return dict(self.pairs_by_loop(base, loops, seeds, items))

    def pairs_by_loop(
        self, base: Arm, loops: Sequence[Arm], seeds: Sequence[int], items: Items | None = None
    ) -> Iterator[tuple[str, list[Pair]]]:
        """The same one loop after the other, since the pairs of many loops would fill the memory."""
        rounds = []
        asked = self._rounds(seeds)
        check_effects(self.tasks["tasks"], self.prompting)
        self._try(base, seeds[0], items)
        for seed, tasks in asked:
            panel = Panel(self.model, [base, *loops], self.journal, seed=seed, progress=self.progress)
            rounds.append((panel, tasks, score(panel, base, tasks, self.prompting, items)))
            self._count_seconds(panel)
        for loop in loops:
            pairs: list[Pair] = []
            for panel, tasks, theirs in rounds:
                ours = score(panel, loop, tasks, self.prompting, items)
                for name, samples in ours.items():
                    pairs += self._pair_up(panel, name, theirs[name], samples)
            if pairs:
                yield loop.name, pairs

    def floor(self, base: Arm, seed: int, journal: Journal) -> Floor | None:
        """How much another batch size alone changes the base's answers, on a sample of the items.

        Args:
            base: the base.
            seed: of sampled generation.
            journal: where the answers with the other batch size are kept.

        Returns:
            None in every process but the first.
        """
        items = {name: self._sample(task) for name, task in self.tasks["tasks"].items()}
        first, size = self._base_answers(base, seed, items, self.journal), self.model.batch_size
        with self.model.other_batch_size() as other:
            second = self._base_answers(base, seed, items, journal)
        return measure_floor(first, second, (size, other)) if first else None

    def _base_answers(self, base: Arm, seed: int, items: Items, journal: Journal) -> list[Answer]:
        panel = Panel(self.model, [base], journal, seed=seed)
        samples = score(panel, base, self.tasks, self.prompting, items)
        return [
            answer_of(self.tasks["tasks"][name], sample, self._metric(name, each), self._count_tokens)
            for name, each in samples.items()
            for sample in of_metric(each, self._metric(name, each))
        ]

    def _sample(self, task) -> list[int]:
        """A few of a task's items, evenly spread."""
        limit = self.prompting.limit
        count = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
        wanted = min(count, MAX_FLOOR_ITEMS, max(MIN_FLOOR_ITEMS, ceil(FLOOR_SHARE * count)))
        return [index * count // wanted for index in range(wanted)]

    def _try(self, base: Arm, seed: int, items: Items | None) -> None:
        """Let the base answer an item of each task, so that what cannot be scored shows before hours are spent."""
        panel = Panel(self.model, [base], Journal(None), seed=seed)
        numbers = items or {name: list(range(len(task.eval_docs))) for name, task in self.tasks["tasks"].items()}
        few = {name: each[: panel.world_size] for name, each in numbers.items()}
        samples = score(panel, base, self.tasks, self.prompting, few)
        for name, each in samples.items():
            compare_pairs(self._pair_up(panel, name, each, each))

    def _rounds(self, seeds: Sequence[int]) -> list[tuple[int, dict]]:
        """Each seed with the tasks to ask: all with the first one, those that sample with the others."""
        sampling = {name: task for name, task in self.tasks["tasks"].items() if _samples(task, self.prompting)}
        if len(seeds) > 1 and not sampling:
            raise EvaluationError(
                f"{len(seeds)} seeds, and no task that samples: the answers would be the same; give one --seed, or "
                "make the models sample, as with --generation do_sample=true,temperature=0.7"
            )
        others = {"tasks": sampling, "groups": {}, "group_map": {}}
        return [(seeds[0], self.tasks), *((seed, others) for seed in seeds[1:])]

    def _pair_up(self, panel: Panel, name: str, base: list[dict], loop: list[dict]) -> list[Pair]:
        task, metric = self.tasks["tasks"][name], self._metric(name, base)
        return pair_up(task, metric, base, loop, seed=panel.seed, count_tokens=self._count_tokens)

    def _metric(self, name: str, samples: list[dict]) -> Metric:
        if name not in self._metrics:
            self._metrics[name] = choose_metric(self.tasks["tasks"][name], samples, self._wanted_metric)
        return self._metrics[name]

    def _count_tokens(self, text: str) -> int:
        return len(self.model.lm.tok_encode(text, add_special_tokens=False)) if text else 0

    def _count_seconds(self, panel: Panel) -> None:
        for name, seconds in panel.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _samples(task: Any, prompting: Prompting) -> bool:
    """Whether a task draws its answers at random."""
    if task.get_config("output_type") != "generate_until":
        return False
    settings = {**(task.get_config("generation_kwargs") or {}), **(prompting.generation or {})}
    samples = settings.get("do_sample")
    if samples is not None:  # then lm-evaluation-harness generates greedily for false, whatever the temperature
        return bool(samples)
    temperature = settings.get("temperature")
    return isinstance(temperature, (int, float)) and temperature > 0
