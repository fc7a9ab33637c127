"""Find the modules from which transformers loaded an export's model."""

from __future__ import annotations

import sys


def code_beside(model, name: str):
    """The module `name` of the code in a model's directory, such as `looped_routing`."""
    package = type(model).__module__.rpartition(".")[0]
    return sys.modules[f"{package}.{name}"]
