"""The looped model in MLX: mlx-lm runs this file, since `model_file` in config.json names it.

Every export has a copy of this file. It needs only mlx-lm, and the files beside it that need nothing else.

mlx-lm runs it outside of any package, with `trust_remote_code`, and asks it for `Model` and `ModelArgs`. The files
beside it import each other by `from .file import name`, so they get a package that consists of this directory. Each
run of this file makes a new one: two exports may hold different code.
"""

import sys
from importlib import import_module
from itertools import count
from pathlib import Path
from types import ModuleType


def _import_beside(name: str) -> ModuleType:
    """Import a file of this directory as part of a new package."""
    package = next(each for number in count() if (each := f"looped_mlx_{number}") not in sys.modules)
    module = ModuleType(package)
    module.__path__ = [str(Path(__file__).parent)]
    sys.modules[package] = module
    return import_module(f"{package}.{name}")


_files = _import_beside("looped_mlx_model")
Model = _files.looped_model
ModelArgs = _files.LoopedArguments
