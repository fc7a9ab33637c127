"""The command line: options, commands, and what they print."""

from .commands import main

__all__ = ["main"]
