"""The command line as a newcomer meets it: help, choices and shell completion."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from typing import get_args

import click
import pytest
from click.testing import CliRunner

import loopexport
from loopexport import choices
from loopexport.cli import main
from loopexport.loop.presets import PRESETS
from loopexport.loop.spec import DECODE_MODES, KV_POLICIES, MODES, PLACES, RULES, SPEC_KEYS
from support.commands import run

ORDER = ["convert", "compare", "scan", "path", "inspect", "verify", "onnx", "mlx", "run", "push", "adopt", "upgrade"]
ORDER += ["restore", "presets", "rules", "families"]

CHOICES = {
    ("convert", "mode"): MODES,
    ("convert", "kv"): KV_POLICIES,
    ("convert", "decode"): DECODE_MODES,
    ("convert", "rule"): RULES,
    ("convert", "weights"): get_args(choices.Weights),
    ("restore", "weights"): get_args(choices.Placement),
    ("verify", "runtime"): get_args(choices.Runtime),
    ("onnx", "dtype"): get_args(choices.OnnxDtype),
    ("onnx", "attention"): get_args(choices.Attention),
    ("run", "provider"): get_args(choices.Provider),
}


def help_of(*names: str) -> str:
    return CliRunner().invoke(main, [*names, "--help"], terminal_width=80).output


def all_commands():
    for name in main.commands:
        command = main.commands[name]
        yield (name,), command
        for inner in getattr(command, "commands", {}):
            yield (name, inner), command.commands[inner]


def complete(words: str, index: int) -> list[str]:
    """What bash is offered for the word `index` of a command line."""
    environment = {"_LOOPEXPORT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
    done = subprocess.run(
        [sys.executable, "-m", "loopexport"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_commands_are_listed_in_the_order_of_work_with_whole_summaries():
    listed = help_of().partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == ORDER
    assert "..." not in "".join(listed)
    assert all(line.endswith(".") and len(line) <= 80 for line in listed)


def test_every_option_has_help():
    for names, command in all_commands():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{names} {parameter.name}"
                assert parameter.help.rstrip().endswith((".", "]")), f"{names} {parameter.name}"


def test_options_of_convert_stand_under_headings():
    text = help_of("convert")
    headings = [line for line in text.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert headings == ["The loop:", "The files:", "The Hub:", "Output:"]
    loop = text.partition("The loop:")[2].partition("The files:")[0]
    for name in (*SPEC_KEYS, *PLACES):
        assert f"  --{name.replace('_', '-')} " in loop
    assert "--json" in text.partition("Output:")[2]


def test_options_of_convert_are_the_keywords_of_the_function():
    taken = set(inspect.signature(loopexport.plan_convert).parameters)
    (command,) = [each for names, each in all_commands() if names == ("convert",)]
    given = {parameter.name for parameter in command.params}
    assert given - {"spec_file", "repo_id", "private", "as_json"} == taken


@pytest.mark.parametrize(("command", "name"), CHOICES)
def test_wrong_choice_is_wrong_usage_and_names_the_allowed(command, name):
    (option,) = [each for each in main.commands[command].params if each.name == name]
    assert tuple(option.type.choices) == tuple(CHOICES[command, name])
    result = run(command, "a", "b", f"--{name}", "telepathy")
    assert result.exit_code == 2
    assert f"Invalid value for '--{name}': 'telepathy' is not one of" in result.stderr
    assert all(f"'{word}'" in result.stderr for word in option.type.choices)


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_text_to_measure_with_is_refused_where_nothing_is_measured(options):
    result = run("onnx", "a", "--dtype", "int8", "--no-verify", "--text", "b", *options)
    assert result.exit_code == 2
    assert "--no-verify skips the measurement that --text is for; give one of them" in result.stderr


def test_bash_completes_commands_presets_choices_and_directories():
    qwen = [preset.name for preset in PRESETS if preset.name.startswith("qw")]
    assert qwen
    assert complete("loopexport convert --preset qw", 3) == [f"plain,{name}" for name in qwen]
    assert complete("loopexport presets show qw", 3) == [f"plain,{name}" for name in qwen]
    assert complete("loopexport convert --kv s", 3) == ["plain,shared"]
    assert complete("loopexport inspect de", 2) == ["dir,de"]
    assert complete("loopexport ", 1) == [f"plain,{name}" for name in ORDER]


def test_shell_completion_is_told_in_the_help():
    assert "_LOOPEXPORT_COMPLETE=bash_source loopexport" in help_of()


def test_help_loads_no_slow_module():
    code = (
        "import sys; from loopexport.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'numpy', 'yaml', 'huggingface_hub', 'tqdm', 'onnx', 'safetensors'}\n"
        "print(*sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
