"""Exports of earlier versions: today's code uses each as it is, and `upgrade` brings its code up to date."""

from __future__ import annotations

import json

import pytest

import loopexport
from loopexport import templates
from loopexport.export import own_code
from loopexport.export.earlier_code import EARLIER_SETS
from loopexport.export.integrity import check_files
from loopexport.export.own_code import code_files, code_set, todays_set
from loopexport.export.results import save_results
from loopexport.export.results_file import RESULTS
from support.commands import checks, run, sha256, tree
from support.compare import assert_close
from support.damage import EXPLODES, edit_config, flip_last_byte
from support.earlier_versions import NAMES, code_of, compute_logits, earlier_export, recorded_logits
from support.hub_double import HubDouble
from support.measured import LOSS, made_result
from support.push import REPO, assert_refused, loopexport_command, pushed, write_listed
from support.refusals import assert_refused as assert_command_refused
from support.trained import save_trained

COMMENT = "# An earlier comment.\n"
OTHER_RULE = 'UPDATES["euler"] = lambda x, g, spec: x\n'

each_version = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def earlier(tmp_path):
    """`earlier(name)`: the export that a version wrote.

    The name of its directory is unique: transformers 4 keeps code that it loaded under the same name before.
    """
    return lambda name: earlier_export(name, tmp_path / f"looped_{tmp_path.name}")


@pytest.fixture
def variant(earlier, monkeypatch):
    """`variant(file, text)`: an export of an invented earlier version, whose `file` ends with this text too."""

    def make(file, text):
        root = earlier("nine-files")
        for path in root.glob("*.py"):
            path.unlink()
        for name in templates.FILES:
            content = own_code.template_bytes(name).decode()
            write_listed(root, name, content + text if name == file else content)
        monkeypatch.setattr(own_code, "EARLIER_SETS", (*EARLIER_SETS, code(root)))
        return root

    return make


def code(root):
    return {path.name: sha256(path) for path in root.glob("*.py")}


def test_every_earlier_set_is_stored_with_its_code():
    assert [{file: sha256(path) for file, path in code_of(name).items()} for name in NAMES] == list(EARLIER_SETS)


@each_version
def test_earlier_export_computes_what_it_computed(earlier, name):
    ours, recorded = compute_logits(earlier(name)), recorded_logits(name)
    for part in ("full", "decode"):
        assert_close(ours[part], recorded[part])


@each_version
def test_earlier_export_is_verified_and_restored(earlier, name, tmp_path):
    root = earlier(name)
    outcome, status = checks(root, "--full")
    assert status == 0, outcome
    assert all(check["passed"] for check in outcome.values())
    assert outcome["weights are the base's"]["passed"]
    loopexport.restore(root, tmp_path / "base")
    assert set(tree(tmp_path / "base")) == {"config.json", "generation_config.json", "model.safetensors"}
    assert run("inspect", root).exit_code == 0


@each_version
def test_earlier_export_is_pushed_with_its_own_code(earlier, name, tmp_path):
    root, hub = earlier(name), HubDouble()
    pushed(loopexport_command(hub, tmp_path / "home", "push", root, REPO, "--json"))
    files = hub.repositories[REPO].files()
    hub.shutdown()
    assert {file for file in files if file.endswith(".py")} == set(code_of(name))
    assert all(files[file] == path.read_bytes() for file, path in code_of(name).items())


@each_version
def test_upgrade_gives_todays_code_and_the_same_logits(earlier, name):
    root = earlier(name)
    result = loopexport.upgrade(root)
    assert code(root) == todays_set()
    assert result.plan.is_current == (EARLIER_SETS[NAMES.index(name)] == todays_set())
    assert result.plan.is_current or result.difference <= 1e-5
    outcome, status = checks(root, "--full")
    assert status == 0, outcome
    for part, logits in compute_logits(root).items():
        assert_close(logits, recorded_logits(name)[part])
    assert loopexport.upgrade(root).plan.is_current


def test_upgrade_keeps_measured_results(earlier):
    root = earlier("nine-files")
    save_results(root, made_result(loopexport.open_export(root).spec, LOSS))
    before = (root / RESULTS).read_bytes()
    assert not loopexport.upgrade(root).plan.is_current
    assert (root / RESULTS).read_bytes() == before
    assert all(check.passed is not False for check in check_files(loopexport.open_export(root)))
    assert "openbookqa" in (root / "README.md").read_text()


def test_upgrade_says_what_it_changes(earlier):
    root = earlier("two-files")
    before = tree(root)
    plan = json.loads(run("upgrade", root, "--dry-run", "--json").stdout)
    assert (plan["written"], plan["is_current"]) == (False, False)
    assert plan["replaced"] == ["configuration_looped.py", "modeling_looped.py"]
    assert set(plan["added"]) == set(templates.FILES) - set(plan["replaced"])
    assert tree(root) == before
    result = run("upgrade", root)
    assert result.exit_code == 0, result.stderr
    assert "Replaces configuration_looped.py, modeling_looped.py\n" in result.stdout
    assert "largest difference 0 of the logits' scale" in result.stdout
    changed = {file for file, digest in tree(root).items() if before.get(file) != digest}
    assert changed == {*templates.FILES, "config.json", "README.md", "loopexport.json"}
    assert loopexport.open_export(root).manifest.loopexport == loopexport.__version__
    again = run("upgrade", root)
    assert (again.exit_code, again.stdout) == (0, f"{root} has today's code already\n")


def test_trained_export_with_earlier_code_stays_trained(earlier, tmp_path):
    root = save_trained(earlier("two-files"), tmp_path / "tuned")
    loopexport.adopt(root)
    assert code(root) == EARLIER_SETS[0]
    assert not loopexport.upgrade(root).plan.is_current
    assert loopexport.open_export(root).manifest.trained
    assert "looped and trained" in (root / "README.md").read_text()
    assert checks(root, "--files-only", "--full")[1] == 0


def test_upgrade_keeps_an_edited_card(earlier):
    root = earlier("two-files")
    (root / "README.md").write_text("# Mine\n")
    assert "Note     README.md was edited, so it stays as it is" in run("upgrade", root).stdout
    assert (root / "README.md").read_text() == "# Mine\n"


def test_only_files_that_differ_are_replaced(variant):
    root = variant("looped_walk.py", COMMENT)
    assert set(code_files(root)) == set(templates.FILES)
    assert checks(root, "--files-only")[1] == 0
    plan = loopexport.plan_upgrade(root)
    assert (plan.added, plan.replaced, plan.removed) == ((), ("looped_walk.py",), ())
    assert loopexport.upgrade(root).difference == 0
    assert code(root) == todays_set()


def test_file_that_today_has_no_more_is_removed(variant, monkeypatch):
    root = variant("looped_walk.py", COMMENT)
    write_listed(root, "looped_older.py", "# Nothing imports it.\n")
    earlier_set = {**own_code.EARLIER_SETS[-1], "looped_older.py": sha256(root / "looped_older.py")}
    monkeypatch.setattr(own_code, "EARLIER_SETS", (earlier_set,))
    monkeypatch.setattr(own_code, "CODE_NAMES", tuple(earlier_set))
    assert loopexport.upgrade(root).plan.removed == ("looped_older.py",)
    assert not (root / "looped_older.py").exists()
    assert checks(root, "--files-only")[1] == 0


def test_code_that_computes_something_else_is_not_replaced(variant, tmp_path):
    root = variant("looped_rules.py", OTHER_RULE)
    assert_command_refused(tmp_path, "upgrade", root, says="of their scale, and 1e-05 is allowed; nothing was changed")


def test_difference_shows_even_where_the_own_loop_does_nothing(variant, tmp_path):
    root = variant("looped_rules.py", OTHER_RULE)
    edit_config(root, loop_steps=1)
    assert_command_refused(tmp_path, "upgrade", root, says="nothing was changed")


REFUSED = {
    "changed code": (lambda root: flip_last_byte(root / "modeling_looped.py"), "was not written by this or an earlier"),
    "code of two versions": (
        lambda root: write_listed(root, "looped_cache.py", own_code.template_bytes("looped_cache.py").decode()),
        "was not written by this or an earlier",
    ),
    "custom generate": (
        lambda root: (root / "custom_generate").mkdir() or (root / "custom_generate/generate.py").write_text(EXPLODES),
        "custom_generate/generate.py in",
    ),
    "changed config": (lambda root: flip_last_byte(root / "base" / "config.json"), "has changed since it was written"),
    "no weights": (lambda root: (root / "model.safetensors").unlink(), "tries new code with the weights first"),
    "no export": (lambda root: (root / "loopexport.json").unlink(), "is not a LoopExport export"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_upgraded_is_refused_in_one_line(earlier, tmp_path, kind):
    root = earlier("two-files")
    damage, says = REFUSED[kind]
    damage(root)
    assert_command_refused(tmp_path, "upgrade", root, says=says)


def test_own_code_that_does_not_run_here_proves_nothing(variant, tmp_path):
    root = variant("looped_walk.py", "raise SystemError('not on this release')\n")
    assert_command_refused(tmp_path, "upgrade", root, says="does not run here with its own code (SystemError")


def test_failed_write_puts_the_old_code_back(earlier, monkeypatch):
    from loopexport.export import code_upgrade

    root = earlier("two-files")
    before = tree(root)

    def fail(export, files):
        raise OSError("the disk is full")

    monkeypatch.setattr(code_upgrade, "write_card_and_manifest", fail)
    with pytest.raises(OSError, match="full"):
        loopexport.upgrade(root)
    assert tree(root) == before


def test_file_of_another_version_is_foreign_in_an_earlier_export(earlier, tmp_path):
    root, hub = earlier("two-files"), HubDouble()
    write_listed(root, "looped_cache.py", EXPLODES)
    assert code_set(root) is None
    done = loopexport_command(hub, tmp_path / "home", "push", root, REPO)
    hub.shutdown()
    assert_refused(done, "is not the installed LoopExport's")
