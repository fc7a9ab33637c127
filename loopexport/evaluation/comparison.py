"""`compare`: a loop and its base answer the same items; what the paired answers show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loopexport._keywords import suggest_keywords
from loopexport.base.families import is_multimodal
from loopexport.choices import Backend
from loopexport.errors import EvaluationError
from loopexport.loop.cost import Cost, loop_cost
from loopexport.loop.presets import find_preset
from loopexport.loop.protocols import Evaluation
from loopexport.loop.spec import LoopSpec

from .arms import Arm, Model, base_arm, default_device, start_batch
from .compare_result import CompareResult, result_of
from .effects import with_token_limit
from .items import Pair
from .journal import Journal
from .settings import check_directory, files_digest, process_rank, results_directory, versions, weights_digest
from .stored import damaged_results, read_result, write_result
from .subject import Subject, find_subject
from .tasks import Prompting, TaskSource, leaf_tasks, task_version

LOOP = "loop"
# Keywords of lm-evaluation-harness's models that have an own option, or that would load another model.
RESERVED_ARGS = {
    "pretrained": "MODEL gives",
    "revision": "--revision gives",
    "subfolder": "would load another model",
    "peft": "would load another model",
    "delta": "would load another model",
    "trust_remote_code": "--trust-remote-code gives",
    "batch_size": "--batch-size gives",
    "hf_overrides": "holds the loop",
    "dtype": "--dtype gives",
    "device": "--device gives",
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ComparePlan:
    """A comparison that is checked and ready; `run` carries it out.

    Attributes:
        subject: the model and its loop.
        tasks: what to compare on.
        prompting: how to ask.
        seeds: of sampled generation.
        backend: "hf" or "vllm".
        batch_size: rows of a forward, to begin with.
        engine: keywords for the model class of lm-evaluation-harness.
        out: the directory that keeps the results, or None.
        settings: what the results depend on.
    """

    subject: Subject
    tasks: TaskSource
    prompting: Prompting
    seeds: tuple[int, ...]
    backend: Backend
    batch_size: int
    engine: dict[str, Any]
    out: Path | None
    settings: dict

    @property
    def cost(self) -> Cost:
        """The cost of the loop per token."""
        return loop_cost(self.subject.base, self.subject.spec)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        notes = [] if self.subject.plan is None else list(self.subject.plan.warnings)
        if self.subject.spec.is_identity:
            notes.append("steps or anchor is 1, so this loop is its base: every difference has to be zero")
        if self.out is None:
            notes.append("without --out, no answer is kept: a run that is stopped has to begin again")
        return tuple(notes)

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {"settings": self.settings, "cost": self.cost.to_dict(), "warnings": list(self.warnings)}

    def run(self, progress: Progress = lambda done, total: None) -> CompareResult | None:
        """Answer all items, and compare; what `out` has already is not computed again.

        Args:
            progress: called with the numbers of answers given, and to give, of the tasks at hand.

        Returns:
            None in every process but the first.

        Raises:
            EvaluationError: a task cannot be loaded or run, the model cannot, or `out` has other results.
        """
        if self.out is not None and (stored := read_result(self.out, self.settings)) is not None:
            if process_rank() != 0:
                return None
            with damaged_results(self.out):
                return result_of(stored.pairs, {**stored.values, "settings": self.settings})
        keep = nullcontext() if self.out is None else results_directory(self.out, self.settings)
        with keep:
            measured = self._measure(progress)
        if measured is None or process_rank() != 0:
            return None
        if self.out is not None:
            write_result(self.out, *measured)
        return result_of(*measured)

    def _measure(self, progress: Progress) -> tuple[list[Pair], dict] | None:
        """The pairs, and what else the result is made of."""
        from .measurement import Measurement  # imports lm-evaluation-harness

        base, loop = base_arm(self.subject.spec), Arm(LOOP, self.subject.spec)
        tasks = self.tasks.load()
        with self.subject.directory() as root:
            model = Model(root, self.backend, self.engine, self.batch_size)
            measurement = Measurement(
                model, self._journal("answers"), tasks, self.prompting, self.tasks.metric, progress
            )
            pairs = measurement.pairs(base, [loop], self.seeds).get(LOOP)
            floor = measurement.floor(base, self.seeds[0], self._journal("floor"))
        if pairs is None:
            return None
        return pairs, {
            "settings": self.settings,
            "task_versions": {name: task_version(task) for name, task in tasks["tasks"].items()},
            "groups": leaf_tasks(tasks),
            "floor": None if floor is None else floor.to_dict(),
            "seconds": measurement.seconds,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }

    def _journal(self, name: str) -> Journal:
        return Journal(None if self.out is None else self.out / f"{name}-{process_rank()}.jsonl")


@suggest_keywords
def plan_compare(
    model: str | Path,
    loop: LoopSpec | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    tasks: Sequence[str] = (),
    items: str | Path | None = None,
    include_path: str | Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool | None = None,
    generation: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    seeds: Sequence[int] = (1234,),
    backend: Backend = "hf",
    batch_size: str | int = "auto",
    dtype: str = "auto",
    device: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    without_adapter: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> ComparePlan:
    """Decide and check a comparison of a loop with its base. Writes nothing except the Hub's cache.

    Args:
        model: an export, a local base, or a Hub id of a base; a base need not be converted first.
        loop: the loop of a base, as a `LoopSpec` or as its fields; None with an export or a preset.
        preset: the name of a published loop. It also gives the tasks and how to ask, where they are known.
        tasks: names of tasks, groups and tags of lm-evaluation-harness, or paths of task YAML files.
        items: a file of items, one JSON object in each line: {prompt, choices, answer} or {prompt, answer}.
        include_path: a directory of the user's own task YAMLs.
        metric: what to compare by, such as "acc" or "exact_match,strict-match"; None for each task's first metric.
        limit: the first so many items of each task; None for all.
        num_fewshot: examples in each prompt; None for each task's own number.
        chat_template: whether to ask in the model's chat format; None for the preset's choice, or else no.
        generation: settings of generation on top of each task's own, such as `{"do_sample": True}`.
        allow_code: run tasks that execute generated code.
        seeds: of sampled generation; several seeds of an item count as one problem.
        backend: "hf" (transformers; base and loop are one model in memory) or "vllm" (one after the other).
        batch_size: rows of a forward; "auto" starts large. It is halved whenever memory runs out.
        dtype: of the model, such as "bfloat16"; "auto" is the checkpoint's.
        device: such as "cuda:0"; None for an accelerator if there is one.
        model_args: more keywords for the model class of lm-evaluation-harness, such as `{"tensor_parallel_size": 2}`.
        out: a directory that keeps every answer and the report. The same call again goes on where it stopped.
        revision: branch, tag or commit of a Hub model.
        without_adapter: ignore a PEFT adapter beside the weights of a base.
        trust_remote_code: run an export's code even if it is not LoopExport's own.
        dry_run: only plan, and do not download weights.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    generation = with_token_limit(generation or {})
    known = _known_evaluation(preset) if not (tasks or items) else None
    if known is not None:
        tasks = known.tasks
        metric = known.metric if metric is None else metric
        num_fewshot = known.num_fewshot if num_fewshot is None else num_fewshot
        chat_template = known.chat_template if chat_template is None else chat_template
        generation = {**known.generation, **generation}
    source = TaskSource(tuple(tasks), _path(include_path), _path(items), metric, bool(chat_template))
    source.check()
    _check_numbers(limit, num_fewshot, seeds)
    subject = find_subject(
        model,
        loop,
        preset=preset,
        revision=revision,
        without_adapter=without_adapter,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
    )
    _check_backend(backend, subject)
    device = device or default_device()
    prompting = Prompting(limit, num_fewshot, bool(chat_template), generation, allow_code=allow_code)
    engine = {"dtype": dtype, **({"device": device} if backend == "hf" else {}), **(model_args or {})}
    _check_settings(prompting.generation, model_args)
    first_batch = start_batch(batch_size, device)
    settings = {
        "model": subject.name,
        "revision": subject.base.origin.revision,
        "weights": None if dry_run else weights_digest(subject.base.shards),
        "model_files": None if dry_run else files_digest(subject.base),
        "spec": subject.spec.to_config_fields(),
        "asked": [*source.names, *([] if source.items is None else [source.items.name])],
        "files_sha256": source.digests(),
        "metric": metric,
        **asdict(prompting),
        "seeds": list(seeds),
        "backend": backend,
        "device": device,
        "batch_size": first_batch,
        "engine": engine,
        "versions": versions(backend),
    }
    plan = ComparePlan(subject, source, prompting, tuple(seeds), backend, first_batch, engine, _path(out), settings)
    if plan.out is not None and not dry_run:
        check_directory(plan.out, settings)
    return plan


def _known_evaluation(preset: str | None) -> Evaluation | None:
    """How a preset's cell was measured.

    Raises:
        EvaluationError: it cannot be measured with lm-evaluation-harness as far as it is known.
    """
    if preset is None:
        return None
    evaluation = find_preset(preset).evaluation
    if evaluation is None:
        raise EvaluationError(
            f"how preset {preset} was measured is not known in the terms of lm-evaluation-harness; choose tasks with "
            f"--tasks, and see `loopexport presets show {preset}`"
        )
    return evaluation


def _path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _check_numbers(limit: int | None, num_fewshot: int | None, seeds: Sequence[int]) -> None:
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit {limit} must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"num_fewshot {num_fewshot} must be at least 0")
    if not seeds or len(set(seeds)) < len(seeds):
        raise EvaluationError(f"seeds {list(seeds)} must be one or more different numbers")


def _check_backend(backend: Backend, subject: Subject) -> None:
    if backend == "vllm" and is_multimodal(subject.base.config):
        raise EvaluationError(
            f"{subject.name} is multimodal, and multimodal models with a loop were not tried on vLLM; use --backend hf"
        )


def _check_settings(generation: Mapping[str, Any] | None, model_args: Mapping[str, Any] | None) -> None:
    """Refuse settings that cannot be recorded, or that would evaluate another model than the one that is named."""
    for option, values in (("generation", generation), ("model_args", model_args)):
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise EvaluationError(
                f"{option} {values} must have only text, finite numbers, true, false, null, and lists of them"
            ) from None
    for name in RESERVED_ARGS.keys() & (model_args or {}).keys():
        raise EvaluationError(f"model_args cannot set {name!r}, which {RESERVED_ARGS[name]}; leave it out")


@suggest_keywords
def compare(
    model: str | Path,
    loop: LoopSpec | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    tasks: Sequence[str] = (),
    items: str | Path | None = None,
    include_path: str | Path | None = None,
    metric: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool | None = None,
    generation: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    seeds: Sequence[int] = (1234,),
    backend: Backend = "hf",
    batch_size: str | int = "auto",
    dtype: str = "auto",
    device: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    without_adapter: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
) -> CompareResult | None:
    """Compare a loop with its base: `plan_compare(...).run(progress)`; the arguments are those of `plan_compare`.

    Example:
        >>> compare("Qwen/Qwen3-4B", LoopSpec(span=(15, 19), steps=3), tasks=["arc_easy"])  # doctest: +SKIP

    Returns:
        None in every process of `accelerate launch` but the first.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    plan = plan_compare(
        model,
        loop,
        preset=preset,
        tasks=tasks,
        items=items,
        include_path=include_path,
        metric=metric,
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=chat_template,
        generation=generation,
        allow_code=allow_code,
        seeds=seeds,
        backend=backend,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        model_args=model_args,
        out=out,
        revision=revision,
        without_adapter=without_adapter,
        trust_remote_code=trust_remote_code,
    )
    return plan.run(progress)
