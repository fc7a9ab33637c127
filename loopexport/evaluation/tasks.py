"""The tasks to compare on: those of lm-evaluation-harness, the user's own YAML, or a file of items."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from loopexport.errors import EvaluationError, nearest, one_line
from loopexport.files.digests import file_sha256

ITEM_KEYS = "{prompt, choices, answer} or {prompt, answer}"
YAML_FILES = (".yaml", ".yml")
OWN_FILES = (*YAML_FILES, ".py", ".json", ".jsonl", ".csv")
WORD = re.compile(r"[^\s'\"\[\]{},]+")
INCLUDE = re.compile(r"^include:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)  # one file, or a list of files on several lines
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_NEW_TOKENS = 64  # of an answer to an item without choices; it ends at the first line break


@dataclass(frozen=True)
class TaskSource:
    """The tasks that the user asked for, before they are loaded.

    Attributes:
        names: names of tasks, groups and tags, or paths of task YAML files.
        include_path: a directory of the user's own task YAMLs, or None.
        items: a file of items, one JSON object in each line, or None.
        metric: the metric to compare, such as "acc" or "exact_match,strict-match"; None for each task's first.
        is_chat: whether prompts are chats, where no space goes between a turn's start and a choice.
    """

    names: tuple[str, ...] = ()
    include_path: Path | None = None
    items: Path | None = None
    metric: str | None = None
    is_chat: bool = False

    def check(self) -> None:
        """Check names and items; this loads no data set.

        Raises:
            EvaluationError: there is no such task, or no task at all, or the file of items is wrong.
        """
        if not (self.names or self.items):
            raise EvaluationError("no task to compare on; give --tasks NAME,... or --items FILE.jsonl")
        if self.items is not None:
            read_items(self.items)
        if self.names:
            index = self._manager()
            for name in self.names:
                _check_name(name, index)

    def load(self) -> dict:
        """The tasks, as `TaskManager.load` of lm-evaluation-harness gives them: `tasks`, `groups` and `group_map`.

        Raises:
            EvaluationError: a task cannot be loaded, as without the network that its data set needs, or two have
                one name.
        """
        manager = self._manager()
        wanted: dict[str, Any] = {name: name for name in self.names}
        if self.items is not None:
            wanted[str(self.items)] = items_task(self.items, is_chat=self.is_chat)
        loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "group_map": {}}
        sources: dict[str, str] = {}
        for source, task in wanted.items():
            with _explained(source):
                found = manager.load([task])
            _check_new({*found["tasks"], *found["groups"]}, source, sources)
            for kind, named in found.items():
                loaded[kind] |= named
        return loaded

    def digests(self) -> dict[str, str]:
        """The sha256 of the user's own files, by name: items, task files, and the code and data that these use."""
        files = [] if self.items is None else [self.items]
        for name in filter(_is_task_file, self.names):
            files += _task_files(Path(name))
        if self.include_path is not None:
            own = [path for path in self.include_path.rglob("*") if path.suffix in OWN_FILES and path.is_file()]
            files += [used for path in sorted(own) for used in _task_files(path)]
        return _digests_by_name(files)

    def _manager(self):
        if self.include_path is not None and not self.include_path.is_dir():
            raise EvaluationError(f"no directory {self.include_path} of task files; give one with --include-path")
        return _index(self.include_path, include_defaults=bool(self.names))


def _check_new(names: set[str], source: str, sources: dict[str, str]) -> None:
    """Refuse a name that an earlier source gave a task, which lm-evaluation-harness would drop."""
    for name in sorted(names & sources.keys()):
        raise EvaluationError(
            f"{sources[name]} and {source} both have a task or group {name}; give one of them, or rename one"
        )
    sources |= dict.fromkeys(names, source)


def _is_task_file(name: str) -> bool:
    return name.endswith(YAML_FILES) and _is_file(Path(name))


def _task_files(path: Path) -> list[Path]:
    """A file of a task, the files that its YAML and those it includes name, and the code beside each YAML."""
    if path.suffix not in YAML_FILES:
        return [path]
    files, unread = [path], [path]
    read: set[Path] = set()
    while unread:
        file = unread.pop(0).resolve()  # lm-evaluation-harness too starts from where a link leads
        if file not in read:  # two YAMLs may name each other
            read.add(file)
            named, included = _named_files(file)
            files += [*named, *sorted(file.parent.glob("*.py"))]
            unread += included
    return files


def _named_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files that a YAML names, and those of them that are YAMLs; one that it includes needs no extension."""
    text = path.read_text(encoding="utf-8", errors="replace")
    included = set(WORD.findall(" ".join(INCLUDE.findall(text))))
    words = dict.fromkeys(WORD.findall(text))
    named = [(word, place / word) for word in words for place in (Path(), path.parent)]
    found = [(word, file) for word, file in named if _is_file(file)]
    return [file for _, file in found], [file for word, file in found if word in included or word.endswith(YAML_FILES)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a word that is too long for a name
        return False


def _digests_by_name(files: Sequence[Path]) -> dict[str, str]:
    """The digests, by the names without folders, which are the user's business; a second file of a name is numbered."""
    digests: dict[str, str] = {}
    for path in {path.resolve(): path for path in files}.values():
        same = sum(name.split(" #")[0] == path.name for name in digests)
        digests[f"{path.name} #{same + 1}" if same else path.name] = file_sha256(path)
    return digests


@lru_cache(maxsize=1)
def _index(include_path: Path | None, include_defaults: bool):
    """The index of tasks; to read the harness's own, some thousand files, takes seconds."""
    with quiet_harness():
        from lm_eval.tasks import TaskManager

        include = None if include_path is None else str(include_path)
        return TaskManager(include_path=include, include_defaults=include_defaults)


@dataclass(frozen=True)
class Prompting:
    """How lm-evaluation-harness makes prompts, and how the models answer them.

    Attributes:
        limit: the first so many items of each task; None for all.
        num_fewshot: examples in each prompt; None for each task's own number.
        chat_template: whether prompts are chats.
        generation: settings of generation on top of each task's own, such as `{"do_sample": True}`.
        fewshot_seed: of the choice of examples.
        allow_code: run tasks whose scoring executes generated code.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    generation: dict | None = None
    fewshot_seed: int = 1234
    allow_code: bool = False


@contextmanager
def quiet_harness():
    """Import lm-evaluation-harness and let it log errors only.

    Raises:
        EvaluationError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise EvaluationError("compare needs lm-evaluation-harness; run: pip install 'loopexport[eval]'") from None
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield


def _check_name(name: str, index) -> None:
    if name in index.all_tasks or _is_task_file(name):
        return
    near = nearest(name, tuple(index.all_tasks))
    hint = f"did you mean {near!r}?" if near else "list them with `lm_eval ls tasks`"
    raise EvaluationError(f"lm-evaluation-harness has no task {name!r}; {hint}")


@contextmanager
def _explained(source: str):
    """Turn whatever a data set's loader raises into one line that says what to do."""
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:
        remedy = (
            "a task of the Hub needs the network once, and is then read from the cache of `datasets`"
            if isinstance(error, OSError)
            else "check its configuration and its data set, which may have no items"
        )
        raise EvaluationError(
            f"cannot load {source}: {type(error).__name__}: {one_line(error, 300)}; {remedy}"
        ) from error


def items_task(path: Path, *, is_chat: bool = False) -> dict:
    """The task of a file of items, as lm-evaluation-harness configures one.

    Items with choices are scored by log-likelihood (acc); others by exact match of the generated line.

    Raises:
        EvaluationError: the file is wrong.
    """
    items = read_items(path)
    scored = _of_choices(is_chat) if "choices" in items[0] else _of_generation()
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": _dataset(items)},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": lambda item: item["prompt"],
        "target_delimiter": "",
        "metadata": {"version": 1},
        **scored,
    }


def _dataset(items: list[dict]):
    from datasets import Dataset

    return Dataset.from_list(items)


def _of_choices(is_chat: bool) -> dict:
    # lm-evaluation-harness too leaves its delimiter out in chats.
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda item: [each.removeprefix(" ") if is_chat else each for each in item["choices"]],
        "doc_to_target": lambda item: item["answer"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _of_generation() -> dict:
    strip = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    return {
        "output_type": "generate_until",
        "doc_to_target": lambda item: item["answer"],
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS},
        "filter_list": [{"name": "line", "filter": strip}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def read_items(path: Path) -> list[dict]:
    """The items of a file, checked; an answer that names a choice becomes its index.

    Raises:
        EvaluationError: the file cannot be read, has no items, or a line is not an item.
    """
    try:
        # utf-8-sig: editors on Windows begin a file with a mark. Only a line break ends an item.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read items from {path}: {one_line(error)}") from None
    items = [_item(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise EvaluationError(f"{path} has no items; write one JSON object in each line, {ITEM_KEYS}")
    if len({"choices" in item for item in items}) > 1:
        raise EvaluationError(f"{path} has items with choices and items without; put them into two files")
    return items


def _item(line: str, place: str) -> dict:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        raise EvaluationError(f"{place} is not JSON; write one object in each line, {ITEM_KEYS}") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or "answer" not in item:
        raise EvaluationError(f"{place} is not an item; an item is {ITEM_KEYS}")
    if SURROGATE.search(json.dumps(item, ensure_ascii=False)):
        raise EvaluationError(f"{place} has half of a character, such as \\ud800; write the whole character")
    return _choice_item(item, place) if "choices" in item else _generation_item(item, place)


def _generation_item(item: dict, place: str) -> dict:
    prompt, answer = item["prompt"], item["answer"]
    if not prompt:
        raise EvaluationError(f"{place}: the prompt is empty; a model needs one to go on from")
    if not isinstance(answer, str) or not answer.strip() or "\n" in answer.strip():
        raise EvaluationError(
            f"{place}: answer {answer!r} must be text of one line where there are no choices: the first line "
            "that the model generates is compared with it"
        )
    return {"prompt": prompt, "answer": answer.strip()}


def _choice_item(item: dict, place: str) -> dict:
    prompt, choices = item["prompt"], item["choices"]
    if not _are_choices(prompt, choices):
        raise EvaluationError(f"{place}: choices must be two or more different texts, none of them empty")
    return {
        "prompt": prompt,
        "choices": [_spaced(prompt, choice) for choice in choices],
        "answer": _choice_index(item["answer"], choices, place),
    }


def _are_choices(prompt: str, choices) -> bool:
    texts = isinstance(choices, list) and all(isinstance(each, str) and each.strip() for each in choices)
    return texts and len({_spaced(prompt, each) for each in choices}) == len(choices) > 1


def _spaced(prompt: str, choice: str) -> str:
    """The choice as it follows the prompt: with a space between them, unless there is white space already."""
    return choice if prompt[-1:].isspace() or choice[0].isspace() or not prompt else f" {choice}"


def _choice_index(answer, choices: list[str], place: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise EvaluationError(
        f"{place}: answer {answer!r} must be one of the choices, or an index from 0 to {len(choices) - 1}"
    )


def leaf_tasks(loaded: dict) -> dict[str, tuple[str, ...]]:
    """For each group, the names of all its tasks, those of its subgroups included."""
    return {name: tuple(task.task_name for task in group.get_all_tasks()) for name, group in loaded["groups"].items()}


def task_version(task) -> str:
    """The version of a task, as its author numbers it."""
    metadata = task.config.metadata or {}
    return str(metadata.get("version", getattr(task, "VERSION", "unknown")))
