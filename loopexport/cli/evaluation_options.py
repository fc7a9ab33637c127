"""Options of `compare` and `scan`: which tasks, how to ask, and how the model computes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import click

from loopexport.choices import Backend

from .groups import ENGINE, OUTPUT, TASKS, Words, combine, option
from .options import merge_spec

DEFAULT_SEED = 1234  # lm-evaluation-harness's own


class CommaList(click.ParamType):
    """Words with commas between them."""

    name = "list"

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        """Split the words."""
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in value.split(",") if word.strip())
        if not words:
            self.fail(f"{value!r} names nothing", param, ctx)
        return words


class Settings(click.ParamType):
    """Settings such as `do_sample=true,temperature=0.7`: names with YAML values."""

    name = "settings"

    def convert(self, value, param, ctx) -> dict[str, Any]:
        """Parse the settings."""
        if isinstance(value, dict):
            return value
        import yaml

        settings = {}
        for part in value.split(","):
            name, equals, text = part.partition("=")
            if not equals or not name.strip():
                self.fail(f"{part!r} is not NAME=VALUE", param, ctx)
            try:
                settings[name.strip()] = yaml.safe_load(text)
            except yaml.YAMLError:
                self.fail(f"the value of {part!r} cannot be read", param, ctx)
        return settings


task_options = combine(
    option(
        TASKS,
        "--tasks",
        type=CommaList(),
        default=(),
        metavar="NAME,...",
        help="Tasks or groups of lm-evaluation-harness (`lm_eval ls tasks` lists them), or paths of task YAML files.",
    ),
    option(
        TASKS,
        "--items",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help='Your own items, one JSON object in each line: {"prompt", "choices", "answer"}, scored by log-likelihood, '
        'or {"prompt", "answer"}, scored by exact match of the generated line.',
    ),
    option(
        TASKS,
        "--include-path",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="A directory of your own task YAMLs.",
    ),
    option(
        TASKS,
        "--metric",
        metavar="NAME[,FILTER]",
        help="What to compare by. Choose it before you see scores.  [default: the first that the task lists]",
    ),
    option(
        TASKS,
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Use the first N items of each task.  [default: all]",
    ),
    option(
        TASKS,
        "--num-fewshot",
        type=click.IntRange(min=0),
        metavar="N",
        help="Examples in each prompt.  [default: the task's own]",
    ),
    option(
        TASKS,
        "--apply-chat-template/--no-chat-template",
        "chat_template",
        default=None,
        help="Ask in the model's chat format.  [default: as the preset, or no]",
    ),
    option(
        TASKS,
        "--generation",
        type=Settings(),
        metavar="NAME=VALUE,...",
        help="Settings of generation on top of the task's own, such as do_sample=true,temperature=0.7.",
    ),
    option(
        TASKS,
        "--seed",
        "seeds",
        type=int,
        multiple=True,
        default=(DEFAULT_SEED,),
        show_default=True,
        help="Random seed of sampled generation. Repeat the option for several; an item counts once all the same.",
    ),
    option(TASKS, "--allow-code", is_flag=True, help="Run tasks that execute the code that the models write."),
)
backend_option = option(
    ENGINE,
    "--backend",
    type=Words(get_args(Backend)),
    default="hf",
    show_default=True,
    help="hf: base and loop are one model in memory. vllm: one engine after the other.",
)
engine_options = combine(
    option(ENGINE, "--device", help="Such as cuda:0, mps or cpu.  [default: an accelerator if there is one]"),
    option(ENGINE, "--dtype", default="auto", show_default=True, help="Such as bfloat16; auto is the checkpoint's."),
    option(
        ENGINE,
        "--batch-size",
        default="auto",
        show_default=True,
        metavar="N",
        help="Rows of a forward; auto starts large. It is halved when memory runs out.",
    ),
    option(
        ENGINE,
        "--model-args",
        type=Settings(),
        metavar="NAME=VALUE,...",
        help="More settings of lm-evaluation-harness's model, such as parallelize=true or tensor_parallel_size=2.",
    ),
)
trust_option = option(
    ENGINE,
    "--trust-remote-code",
    is_flag=True,
    help="Run an export's code that differs from the installed LoopExport's.",
)
results_option = option(
    OUTPUT,
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep every answer and the report here. The same command again goes on where it stopped.",
)
save_option = option(OUTPUT, "--save", is_flag=True, help="Write the result into the export and its card.")

# Names of the options that are not fields of the loop.
_ASKED = (
    "preset",
    "tasks",
    "items",
    "include_path",
    "metric",
    "limit",
    "num_fewshot",
    "chat_template",
    "generation",
    "seeds",
    "allow_code",
    "backend",
    "device",
    "dtype",
    "batch_size",
    "model_args",
    "trust_remote_code",
    "out",
    "revision",
    "without_adapter",
)


def split_loop(spec_file: Path | None, given: dict, *, is_export: bool) -> tuple[dict, dict]:
    """The fields of the loop that were given, and the other options.

    Args:
        spec_file: the YAML file of the loop, or None.
        given: the values of all options.
        is_export: whether the model has its own loop. The fields, and the spec file, are then as they were given.

    Raises:
        click.UsageError: the loop of a base lacks its span or steps.
    """
    asked = {name: given[name] for name in _ASKED if name in given}
    fields = {name: value for name, value in _without(given, _ASKED).items() if value not in (None, ())}
    if is_export:
        return fields | ({} if spec_file is None else {"spec_file": spec_file}), asked
    if not fields and spec_file is None and asked.get("preset") is not None:
        return {}, asked
    loop = merge_spec(spec_file, {**fields, "preset": asked.get("preset")})
    return _without(loop, ("preset",)), {**asked, "preset": loop.get("preset")}


def _without(values: dict, names: Iterable[str]) -> dict:
    return {name: value for name, value in values.items() if name not in names}
