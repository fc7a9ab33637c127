"""The command line: parse, call the library, print. Results go to stdout, progress and errors to stderr.

Exit status: 0 success, 1 a known error or a failed check, 2 wrong usage, 130 interrupted. Commands import slow modules
inside their functions, so that `--help` answers at once.
"""

from .commands import main

__all__ = ["main"]
