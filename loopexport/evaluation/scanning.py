"""`scan`: many loops of one base on the same items, on one load; the best are tested on items of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopexport._keywords import suggest_keywords
from loopexport.base.download import find_checkpoint
from loopexport.choices import DecodeMode, KvPolicy, Mode, RuleName
from loopexport.errors import EvaluationError
from loopexport.export.directory import is_export

from .comparison import plan_compare
from .grid import Grid, within_budget
from .scan_result import ScanResult
from .scan_run import Progress, ScanPlan
from .settings import check_directory

SPLIT_BY = "item"  # earlier scans split by task and item, and must not go on with this split


@suggest_keywords
def plan_scan(
    model: str | Path,
    *,
    spans: Sequence[str | tuple[int, int]] = (),
    widths: Sequence[int] = (),
    stride: int = 1,
    steps: Sequence[int] = (2,),
    damping: Sequence[float | None] = (None,),
    anchor: Sequence[float] = (0.0,),
    mode: Sequence[Mode] = ("block",),
    rule: Sequence[RuleName] = ("euler",),
    kv: Sequence[KvPolicy] = ("shared",),
    decode: DecodeMode = "full",
    frozen_routing: bool = False,
    norm_interpolation: bool = False,
    test_share: float = 0.5,
    finalists: int = 3,
    max_evaluations: int | None = None,
    max_hours: float | None = None,
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
    batch_size: str | int = "auto",
    dtype: str = "auto",
    device: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    without_adapter: bool = False,
    dry_run: bool = False,
) -> ScanPlan:
    """Decide and check a scan of loops of one base. Writes nothing except the Hub's cache.

    The grid has every combination of the values. A combination that does not fit the base is left out.

    Args:
        model: a local base or a Hub id of a base.
        spans: pairs or texts such as "8:12", half-open.
        widths: instead of `spans`, the widths of spans over the whole depth.
        stride: layers between the starts of two spans of one width.
        steps: numbers of steps, K.
        damping: step sizes; None is the rule's default.
        anchor: weights of the natural pass.
        mode: "block" or "layer", or both.
        rule: update rules, keys of `RULES`.
        kv: K/V policies.
        decode: which decode steps loop, in all cells.
        frozen_routing: whether iterations use the experts that the natural pass chose, in all cells.
        norm_interpolation: whether each iterate is rescaled, in all cells.
        test_share: about how much of the items is for the test of the best loops; the others rank all loops.
        finalists: how many loops are tested, at most.
        max_evaluations: how many loops of the grid to try, at most, spread evenly over it; None for all.
        max_hours: how long the scan may take, by an estimate from a few items; it tries fewer loops then.
        tasks: names of tasks, groups and tags of lm-evaluation-harness, or paths of task YAML files.
        items: a file of items, one JSON object in each line: {prompt, choices, answer} or {prompt, answer}.
        include_path: a directory of the user's own task YAMLs.
        metric: what to compare by, such as "acc" or "exact_match,strict-match"; None for each task's first metric.
        limit: the first so many items of each task; None for all.
        num_fewshot: examples in each prompt; None for each task's own number.
        chat_template: whether to ask in the model's chat format; None for no.
        generation: settings of generation on top of each task's own, such as `{"do_sample": True}`.
        allow_code: run tasks that execute generated code.
        seeds: of sampled generation; several seeds of an item count as one problem.
        batch_size: rows of a forward; "auto" starts large. It is halved whenever memory runs out.
        dtype: of the model, such as "bfloat16"; "auto" is the checkpoint's.
        device: such as "cuda:0"; None for an accelerator if there is one.
        model_args: more keywords for the model class of lm-evaluation-harness.
        out: a directory that keeps every answer and the tables. The same call again goes on where it stopped.
        revision: branch, tag or commit of a Hub model.
        without_adapter: ignore a PEFT adapter beside the weights of the base.
        dry_run: only plan, and do not download weights.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise EvaluationError("a scan runs in one process; start it without accelerate launch or torchrun")
    _check_numbers(test_share, finalists, max_evaluations, max_hours)
    grid = Grid(
        tuple(spans),
        tuple(widths),
        stride,
        tuple(steps),
        {
            "damping": damping,
            "anchor": anchor,
            "mode": mode,
            "rule": rule,
            "kv": kv,
            "decode": (decode,),
            "frozen_routing": (frozen_routing,),
            "norm_interpolation": (norm_interpolation,),
        },
    )
    grid.check()
    if is_export(Path(model).expanduser()):
        raise EvaluationError(f"{model} is an export and has its own loop; scan its base")
    base = find_checkpoint(str(model), revision, headers_only=dry_run, without_adapter=without_adapter)
    all_cells, misfits = grid.cells(base)
    cells, beyond = within_budget(all_cells, max_evaluations, f"{max_evaluations} evaluations")
    compare = plan_compare(
        model,
        cells[0].spec,
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
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        model_args=model_args,
        revision=revision,
        without_adapter=without_adapter,
        dry_run=dry_run,
    )
    settings = {
        **{name: value for name, value in compare.settings.items() if name != "spec"},
        "cells": {cell.name: cell.spec.to_config_fields() for cell in cells},
        "split_by": SPLIT_BY,
        "test_share": test_share,
        "finalists": finalists,
        "max_hours": max_hours,
    }
    root = None if out is None else Path(out).expanduser()
    if root is not None and not dry_run:
        check_directory(root, settings)
    return ScanPlan(compare, tuple(cells), (*misfits, *beyond), test_share, finalists, max_hours, root, settings)


def _check_numbers(test_share: float, finalists: int, max_evaluations: int | None, max_hours: float | None) -> None:
    if not 0 < test_share < 1:
        raise EvaluationError(f"test share {test_share:g} must be between 0 and 1, such as 0.5")
    if finalists < 1:
        raise EvaluationError(f"finalists {finalists} must be at least 1")
    if max_evaluations is not None and max_evaluations < 1:
        raise EvaluationError(f"max evaluations {max_evaluations} is too small for one loop; give at least 1")
    if max_hours is not None and not max_hours > 0:
        raise EvaluationError(f"max hours {max_hours:g} must be more than 0")


@suggest_keywords
def scan(
    model: str | Path,
    *,
    spans: Sequence[str | tuple[int, int]] = (),
    widths: Sequence[int] = (),
    stride: int = 1,
    steps: Sequence[int] = (2,),
    damping: Sequence[float | None] = (None,),
    anchor: Sequence[float] = (0.0,),
    mode: Sequence[Mode] = ("block",),
    rule: Sequence[RuleName] = ("euler",),
    kv: Sequence[KvPolicy] = ("shared",),
    decode: DecodeMode = "full",
    frozen_routing: bool = False,
    norm_interpolation: bool = False,
    test_share: float = 0.5,
    finalists: int = 3,
    max_evaluations: int | None = None,
    max_hours: float | None = None,
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
    batch_size: str | int = "auto",
    dtype: str = "auto",
    device: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    revision: str | None = None,
    without_adapter: bool = False,
    progress: Progress = lambda done, total: None,
) -> ScanResult:
    """Try many loops of a base and test the best: `plan_scan(...).run(progress)`.

    Example:
        >>> scan("Qwen/Qwen3-4B", widths=[4], stride=2, steps=[2, 3], tasks=["arc_easy"])  # doctest: +SKIP

    Args:
        model: a local base or a Hub id of a base.
        spans: pairs or texts such as "8:12", half-open.
        widths: instead of `spans`, the widths of spans over the whole depth.
        stride: layers between the starts of two spans of one width.
        steps: numbers of steps, K.
        damping: step sizes; None is the rule's default.
        anchor: weights of the natural pass.
        mode: "block" or "layer", or both.
        rule: update rules, keys of `RULES`.
        kv: K/V policies.
        decode: which decode steps loop, in all cells.
        frozen_routing: whether iterations use the experts that the natural pass chose, in all cells.
        norm_interpolation: whether each iterate is rescaled, in all cells.
        test_share: about how much of the items is for the test of the best loops; the others rank all loops.
        finalists: how many loops are tested, at most.
        max_evaluations: how many loops of the grid to try, at most, spread evenly over it; None for all.
        max_hours: how long the scan may take, by an estimate from a few items; it tries fewer loops then.
        tasks: names of tasks, groups and tags of lm-evaluation-harness, or paths of task YAML files.
        items: a file of items, one JSON object in each line: {prompt, choices, answer} or {prompt, answer}.
        include_path: a directory of the user's own task YAMLs.
        metric: what to compare by, such as "acc" or "exact_match,strict-match"; None for each task's first metric.
        limit: the first so many items of each task; None for all.
        num_fewshot: examples in each prompt; None for each task's own number.
        chat_template: whether to ask in the model's chat format; None for no.
        generation: settings of generation on top of each task's own, such as `{"do_sample": True}`.
        allow_code: run tasks that execute generated code.
        seeds: of sampled generation; several seeds of an item count as one problem.
        batch_size: rows of a forward; "auto" starts large. It is halved whenever memory runs out.
        dtype: of the model, such as "bfloat16"; "auto" is the checkpoint's.
        device: such as "cuda:0"; None for an accelerator if there is one.
        model_args: more keywords for the model class of lm-evaluation-harness.
        out: a directory that keeps every answer and the tables. The same call again goes on where it stopped.
        revision: branch, tag or commit of a Hub model.
        without_adapter: ignore a PEFT adapter beside the weights of the base.
        progress: called with the numbers of answers given, and to give, of the requests at hand.

    Raises:
        LoopExportError: something is wrong; the message says what to do.
    """
    plan = plan_scan(
        model,
        spans=spans,
        widths=widths,
        stride=stride,
        steps=steps,
        damping=damping,
        anchor=anchor,
        mode=mode,
        rule=rule,
        kv=kv,
        decode=decode,
        frozen_routing=frozen_routing,
        norm_interpolation=norm_interpolation,
        test_share=test_share,
        finalists=finalists,
        max_evaluations=max_evaluations,
        max_hours=max_hours,
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
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        model_args=model_args,
        out=out,
        revision=revision,
        without_adapter=without_adapter,
    )
    return plan.run(progress)
