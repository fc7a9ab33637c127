"""A push that fails or is killed leaves all or nothing, and the same command completes it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from support.hub_requests import EXPIRED_TOKEN, OWNER_TOKEN, STRANGER_TOKEN
from support.push import (
    REPO,
    RUN,
    assert_refused,
    assert_whole_or_untouched,
    bytes_received,
    environment,
    loopexport_command,
    pushed,
    start_push,
    weights,
)

SECOND = r"/objects/.*{second}"  # the upload of the second shard
FAILURES = {
    "expired token": ("GET", "whoami", {"status": 401}, "the Hub does not accept the token"),
    "too many requests": (
        "GET",
        "whoami",
        {"status": 429, "headers": {"Retry-After": "7"}},
        "wait 7 s and run the same",
    ),
    "trouble at the start": ("GET", "/api/models/me/", {"status": 500}, "the Hub has an error of its own (500"),
    "no connection": ("GET", "whoami", {"drop": True}, "the connection to the Hub broke"),
    "name taken meanwhile": ("POST", "/repos/create", {"status": 403}, "you may not write to me/Looped"),
    "preupload fails": ("POST", "/preupload/", {"status": 503}, "the Hub has an error of its own (503"),
    "vanished": ("POST", "/preupload/", {"status": 404, "code": "RepoNotFound"}, "there is no me/Looped on the Hub"),
    "batch fails": ("POST", "/objects/batch", {"status": 500}, "the Hub has an error of its own (500"),
    "quota": (
        "POST",
        "/objects/batch",
        {"status": 403, "message": "storage limit reached"},
        "does not accept the files",
    ),
    "upload fails": ("PUT", SECOND, {"status": 500}, "the Hub has an error of its own (500"),
    "token expires": ("PUT", SECOND, {"status": 401}, "the Hub does not accept the token"),
    "upload is cut": ("PUT", SECOND, {"drop_after_bytes": 70_000}, "the connection to the Hub broke"),
    "verify fails": ("POST", rf"{SECOND}/verify", {"status": 500}, "the Hub has an error of its own (500"),
    "commit fails": ("POST", "/commit/", {"status": 500}, "the Hub has an error of its own (500"),
    "commit is limited": ("POST", "/commit/", {"status": 429}, "wait a while and run the same command again"),
    "commit conflicts": ("POST", "/commit/", {"status": 409}, "is being changed by someone else"),
    "branch moved": ("POST", "/commit/", {"status": 412}, "is being changed by someone else"),
    "commit is cut": ("POST", "/commit/", {"drop": True}, "the connection to the Hub broke"),
    "answer is lost": ("POST", "/commit/", {"drop": "late"}, "the connection to the Hub broke"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_is_one_line_and_the_same_command_completes_without_sending_anything_twice(hub, push, export, kind):
    method, pattern, fault, says = FAILURES[kind]
    second = sorted(weights(export).items())[1][1]
    hub.fail(method, pattern.format(second=second), times=99, **fault)
    assert_refused(push("--no-server-copy"), says)
    assert_whole_or_untouched(hub, export, is_whole=kind == "answer is lost")
    hub.faults.clear()
    done = push("--json", "--no-server-copy")
    assert pushed(done)["commit"] == hub.repositories[REPO].refs["main"]
    assert_whole_or_untouched(hub, export, is_whole=True)
    sizes = {digest: (export / name).stat().st_size for name, digest in weights(export).items()}
    if method == "PUT":
        del sizes[second]
    assert {digest: hub.received[digest] for digest in sizes} == sizes


def test_quota_of_the_object_store_is_told(hub, push):
    hub.quota_bytes = 1000
    assert_refused(push("--no-server-copy"), "does not accept the files of me/Looped: Private repository storage limit")


@pytest.mark.parametrize(
    ("token", "to", "says"),
    [
        (EXPIRED_TOKEN, REPO, "the Hub does not accept the token"),
        (None, REPO, "no Hub token; log in (`hf auth login`), set HF_TOKEN, or give --token"),
        (STRANGER_TOKEN, REPO, "you may not write to me/Looped"),
        (STRANGER_TOKEN, "team/there", "you may not write to team/there"),
        (OWNER_TOKEN, "a/b/c", "'a/b/c' is not a repository id"),
    ],
)
def test_refusals_come_before_any_weight_is_hashed_or_sent(hub, push, token, to, says):
    hub.commit("team/there", {".gitattributes": b""})
    done = push(to=to, token=token)
    assert_refused(done, says)
    assert bytes_received(hub) == 0


def test_offline_mode_is_told(hub, export, tmp_path):
    settings = {**environment(hub, tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, "push", str(export), REPO]
    assert_refused(subprocess.run(command, capture_output=True, text=True, env=settings), "HF_HUB_OFFLINE is set")


def test_pull_request_of_a_branch_is_refused(push):
    assert_refused(push("--create-pr", "--revision", "other"), "leave out --revision other")


def test_directory_that_is_no_export_is_refused(hub, base, tmp_path):
    assert_refused(loopexport_command(hub, tmp_path / "home", "push", base, REPO), "is not a LoopExport export")


def test_commit_of_someone_else_in_between_is_never_overwritten(hub, push, export):
    hub.commit(REPO, {"theirs.txt": b"1"})
    hub.fail("POST", "/preupload/", delay=0.5)
    process = start_push(hub, export)
    while not any("/preupload/" in path for _, path in hub.asked):
        time.sleep(0.01)
    theirs = hub.commit(REPO, {"theirs.txt": b"2"})
    assert process.wait() == 1
    assert hub.repositories[REPO].refs["main"] == theirs
    assert pushed(push("--json"))["commit"]
    assert hub.repositories[REPO].files()["theirs.txt"] == b"2"


def test_killed_between_two_uploads_does_not_send_the_finished_ones_again(hub, push, export):
    finished = dict(sorted(weights(export).items()))
    _, second = finished.popitem()
    hub.fail("PUT", second, delay=5.0)
    process = start_push(hub, export)
    while not (REPO in hub.repositories and set(finished.values()) <= set(hub.repositories[REPO].objects)):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert_whole_or_untouched(hub, export, is_whole=False)
    pushed(push("--json", "--no-server-copy"))
    assert_whole_or_untouched(hub, export, is_whole=True)
    assert all(hub.received[digest] == (export / name).stat().st_size for name, digest in finished.items())


@pytest.mark.parametrize(
    ("moment", "kill"),
    [(0.1, signal.SIGKILL), (0.25, signal.SIGINT), (0.4, signal.SIGKILL), (0.55, signal.SIGINT), (0.7, signal.SIGKILL)],
)
def test_killed_at_any_moment_leaves_all_or_nothing(hub, push, export, moment, kill):
    hub.fail("POST|PUT", ".", delay=0.05, times=99)
    process = start_push(hub, export)
    while not hub.asked:
        time.sleep(0.01)
    time.sleep(moment)
    process.send_signal(kill)
    process.wait()
    repository = hub.repositories.get(REPO)
    assert_whole_or_untouched(hub, export, is_whole=repository is not None and "config.json" in repository.files())
    hub.faults.clear()
    pushed(push("--json", "--no-server-copy"))
    assert_whole_or_untouched(hub, export, is_whole=True)
