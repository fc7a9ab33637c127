"""The modules that an export's model was loaded from."""

from __future__ import annotations

import sys


def code_beside(model, name: str):
    """The module `name` of the code that came with a model, such as `looped_routing`."""
    package = type(model).__module__.rpartition(".")[0]
    return sys.modules[f"{package}.{name}"]
