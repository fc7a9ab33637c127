"""Run the commands of the terminal picture and keep what they print, for `terminal.py` to draw.

    python docs/pictures/record.py DIRECTORY

DIRECTORY is named `demo` and holds `SmolLM2-135M-Instruct`, which `make demo` builds. `loopexport` has to be on the
PATH. The outputs go to `docs/pictures/data/terminal.json`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

DATA = Path(__file__).parent / "data" / "terminal.json"
COMMANDS = (
    "loopexport convert demo/SmolLM2-135M-Instruct demo/looped --span 13:17 --steps 3",
    "loopexport verify demo/looped",
    "loopexport onnx demo/looped",
    'loopexport run demo/looped "What is the capital of France?"',
)


def record(directory: Path) -> list[dict]:
    """Run every command beside `directory`, in order, and return the command, its seconds and its lines."""
    entries = []
    shutil.rmtree(directory / "looped", ignore_errors=True)
    for command in COMMANDS:
        start = time.perf_counter()
        done = subprocess.run(shlex.split(command), cwd=directory.parent, stdout=subprocess.PIPE, text=True, check=True)
        seconds = round(time.perf_counter() - start, 1)
        entries.append({"command": command, "seconds": seconds, "output": done.stdout.splitlines()})
    return entries


if __name__ == "__main__":
    DATA.write_text(json.dumps(record(Path(sys.argv[1]).resolve()), indent=2, ensure_ascii=False) + "\n")
