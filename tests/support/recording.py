"""`pytest --record NAME`: run a long walk and write its record if every cell of it passed.

Cells that passed are noted as they pass, with the digest, in `.pytest_cache`: a walk that was stopped goes on where it
was, as long as the code is the same.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from support import compare
from support.paths import ROOT
from support.records import RECORDS

NARROWED = "--record takes the whole walk: leave out -k, -m, --deselect, --lf and the names of tests"


class Recorder:
    """Chooses the tests of a walk, notes what came of each, and writes the record."""

    def __init__(self, config: pytest.Config):
        option = config.option
        narrowed = option.keyword or option.markexpr or option.deselect or getattr(option, "lf", False)
        if narrowed or any("::" in argument for argument in config.args):
            raise pytest.UsageError(NARROWED)
        self.record = RECORDS[option.record]
        self.digest = self.record.digest()
        self.is_worker = hasattr(config, "workerinput")
        self.with_slow = option.with_slow
        self.partial = ROOT / ".pytest_cache" / "records" / f"{self.record.name}.json"
        self.results: dict[str, dict] = self._earlier()
        self.wanted: set[str] = set()

    def _earlier(self) -> dict[str, dict]:
        if not self.partial.exists():
            return {}
        noted = json.loads(self.partial.read_text())
        return noted["results"] if noted["digest"] == self.digest else {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """Keep the tests of the walk that did not pass yet."""
        here = [item for item in items if self._is_in_a_place_of_the_walk(item)]
        walked = {_function_of(item) for item in here if self.record.whole or item.get_closest_marker("matrix")}
        walk = [item for item in here if _function_of(item) in walked]  # the cells of `make test` are part of it
        self.wanted |= {item.nodeid for item in walk}
        kept = [item for item in walk if item.nodeid not in self.results]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def _is_in_a_place_of_the_walk(self, item) -> bool:
        if item.get_closest_marker("slow") is not None and not self.with_slow:
            return False
        file = item.nodeid.partition("::")[0]
        return any(file == place or file.startswith(f"{place}/") for place in self.record.tests)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        """Take over from a worker which tests there are."""
        self.wanted |= set(ids) | set(self.results)

    def pytest_runtest_logreport(self, report):
        """Note a test that passed, or was skipped with a reason."""
        if self.is_worker:
            return
        if report.failed:
            self.results.pop(report.nodeid, None)
        elif report.when == "call" or report.skipped:
            self._note(report)

    def _note(self, report):
        result = dict(report.user_properties)
        if report.skipped:
            result = {"outcome": "skipped", "reason": str(report.longrepr[2]).removeprefix("Skipped: ")}
        self.results[report.nodeid] = {"outcome": "passed", **result}
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.partial.write_text(json.dumps({"digest": self.digest, "results": self.results}))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        """Write the record if all that belongs to the walk passed, on code that is still the same."""
        if self.is_worker:
            return
        done = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        lacking = self.wanted - set(self.results)
        if not done or session.testsfailed or lacking or not self.wanted or self.digest != self.record.digest():
            print(f"\n{self.record.file.relative_to(ROOT)} is not written: {len(lacking)} cells lack")
            return
        results = {name: self.results[name] for name in self.wanted}
        if self.record.keeps_earlier:
            results |= earlier_results(self.record.read()["results"], results)
        write(self.record.file, self.digest, self._versions(), results)
        self.partial.unlink(missing_ok=True)
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK
        print(f"\nwrote {self.record.file.relative_to(ROOT)}: {len(self.wanted)} cells")

    def _versions(self) -> dict[str, str]:
        return {name: _version(name) for name in ("torch", "transformers", *self.record.packages)}


def _function_of(item) -> str:
    return item.nodeid.partition("[")[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def earlier_results(before: dict[str, dict], now: dict[str, dict]) -> dict[str, dict]:
    """The cells of the last record that this walk left out, marked as cells of earlier code; no refusals of that."""
    done = {_cell(result) for result in now.values()}
    served = {name: result for name, result in before.items() if result["outcome"] == "exact"}
    return {name: {**result, "earlier": True} for name, result in served.items() if _cell(result) not in done | {()}}


def _cell(result: dict) -> tuple:
    """What a cell of vLLM is about; empty for other tests."""
    return tuple(result[key] for key in ("family", "kv", "setting", "loop")) if "family" in result else ()


def write(file: Path, digest: str, versions: dict[str, str], results: dict[str, dict]) -> None:
    """Write a record, one line a cell."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    head = f' "digest": {json.dumps(digest)},\n "versions": {json.dumps(versions)},\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{\n{head} "results": {{\n{lines}\n }}\n}}\n')


@pytest.fixture(autouse=True)
def largest_difference_of_the_test(record_property):
    """Put the largest difference that a test compared into its report."""
    compare.LARGEST.clear()
    yield
    if compare.LARGEST:
        record_property("difference", float(f"{max(compare.LARGEST):.2g}"))
