"""Which tests share a worker of pytest-xdist, and which start first.

The tests of a file share a worker, so that its fixtures are made once, and long files start first. The files of
`tests/onnx` share one, since a trace takes seconds. The long matrices are spread test by test. pytest-xdist's own mark
for it, `xdist_group`, does nothing under pytest 9.2.
"""

from __future__ import annotations

from xdist.scheduler.loadscope import LoadScopeScheduling

# Longest first, in the order of measured times; all others follow in the order of collection.
ONNX = "tests/onnx"
LONG = (
    ONNX,
    "tests/test_real_model.py",
    "tests/templates/test_compile.py",
    "tests/cli/test_fuzz.py",
    "tests/templates/test_rules.py",
    "tests/checks/test_verify.py",
    "tests/templates/test_routers.py",
    "tests/hub/test_failures.py",
    "tests/templates/test_tensor_parallel.py",
    "tests/templates/test_vllm_seam.py",
    "tests/templates/test_semantics.py",
    "tests/templates/test_experts.py",
    "tests/templates/test_runtime.py",
    "tests/hub/test_push_onnx.py",
)
VLLM = "tests/checks/test_vllm.py"


class ByFile(LoadScopeScheduling):
    """Gives whole files to workers."""

    def __init__(self, config, log):
        super().__init__(config, log)
        self.is_matrix = bool(config.option.record) or config.option.markexpr == "matrix"
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        place = _place(nodeid)
        if place == VLLM:
            return _process_of(nodeid)
        return nodeid if self.is_matrix else place


def place_of(nodeid: str) -> int:
    """Where the file of a test stands in the order of files."""
    place = _place(nodeid)
    return LONG.index(place) if place in LONG else len(LONG)


def _place(nodeid: str) -> str:
    """The file of a test, or the folder whose files share a worker."""
    file = nodeid.partition("::")[0]
    return ONNX if file.startswith(f"{ONNX}/") else file


def _process_of(nodeid: str) -> str:
    """Cases that one process of vLLM serves stay together."""
    from support.vllm_cases import FEW, MANY, REFUSED, SLOW

    groups = {str(case): str(case.group) for case in (*FEW, *MANY, *SLOW, *REFUSED)}
    return groups.get(nodeid.partition("[")[2].removesuffix("]"), nodeid.partition("[")[0])
