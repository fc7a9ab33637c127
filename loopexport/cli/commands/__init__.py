"""The commands, one file each, in the order of work."""

from __future__ import annotations

import click

from loopexport._version import __version__
from loopexport.cli.groups import Group

from .adopt import adopt
from .compare import compare
from .convert import convert
from .families import families
from .inspect import inspect
from .mlx import mlx
from .onnx import onnx
from .path import path
from .presets import presets
from .push import push
from .restore import restore
from .rules import rules
from .run import run
from .scan import scan
from .upgrade import upgrade
from .verify import verify

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
EPILOG = """
\b
Shell completion for bash, zsh and fish:
  eval "$(_LOOPEXPORT_COMPLETE=bash_source loopexport)"
  eval "$(_LOOPEXPORT_COMPLETE=zsh_source loopexport)"
  _LOOPEXPORT_COMPLETE=fish_source loopexport | source
"""


@click.group(cls=Group, context_settings=CONTEXT, epilog=EPILOG)
@click.version_option(__version__, prog_name="loopexport")
def main() -> None:
    """Turn a frozen causal language model into a looped one, without training.

    The looped model runs a span of middle layers several times in small damped steps (arXiv 2605.23872). It may or may
    not be better: compare it with the base on your own task.
    """


for command in (
    convert,
    compare,
    scan,
    path,
    inspect,
    verify,
    onnx,
    mlx,
    run,
    push,
    adopt,
    upgrade,
    restore,
    presets,
    rules,
    families,
):
    main.add_command(command)
