"""Damage an export in the ways that disks, users and attackers do."""

from __future__ import annotations

import json
import os

EXPLODES = "raise SystemExit('foreign code ran')\n"


def flip_last_byte(path):
    """Flip the lowest bit of a file's last byte."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def edit_config(root, **changes):
    """Set fields of `config.json`."""
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, **changes}))
