"""Links that stay in their directory, or in their part of the Hub's cache, are followed; all others are refused."""

from __future__ import annotations

import pytest

from loopexport.errors import CheckpointError
from loopexport.files.links import check_link


@pytest.fixture
def root(tmp_path):
    for path in ("root/more/file", "root/.git/config", "root/.env", "secret", "root-2/file"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("text")
    return tmp_path / "root"


INSIDE = ["more/file", "./more/../more/file", "../root/more/file", "nowhere", "link"]
OUTSIDE = [
    "../secret",
    "/etc/hostname",
    "/proc/self/environ",
    "../nowhere",
    "../root-2/file",
    "..",
    ".git/config",
    ".env",
]


@pytest.mark.parametrize("target", INSIDE)
def test_link_that_stays_inside_passes(root, target):
    (root / "link").symlink_to(target)
    check_link(root, "link")


@pytest.mark.parametrize("target", OUTSIDE)
@pytest.mark.parametrize("via", [None, "more", "chain"])
def test_link_that_leaves_or_ends_at_a_hidden_file_is_refused(root, target, via):
    name = "link"
    (root / "link").symlink_to(target)
    if via == "chain":
        (root / "first").symlink_to("link")
        name = "first"
    elif via == "more":
        (root / "more" / "up").symlink_to("..")
        name = "more/up/link"
    with pytest.raises(CheckpointError, match=f"^{name} is a symbolic link to .*; replace it with the file itself"):
        check_link(root, name)


def test_file_behind_a_linked_folder_is_refused(root, tmp_path):
    (root / "templates").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="templates/secret is a symbolic link"):
        check_link(root, "templates/secret")


@pytest.mark.parametrize("name", ["more/file", "none", "LICENSE"])
def test_what_is_no_link_passes_and_the_directory_may_be_one(root, tmp_path, name):
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / ".hidden").symlink_to(tmp_path)
    for directory in (root, tmp_path / "alias", tmp_path / ".hidden" / "root"):
        check_link(directory, name)


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot in a cache: a file, and one in a folder, as links to blobs; one blob is a link to another."""
    repo = tmp_path / ".cache" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    (snapshot / "base").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "1").write_text("text")
    (repo / "blobs" / "2").symlink_to("1")
    (snapshot / "file").symlink_to("../../blobs/1")
    (snapshot / "base" / "file").symlink_to("../../../blobs/2")
    return snapshot


def test_blobs_of_the_hubs_cache_are_followed(snapshot, tmp_path):
    (tmp_path / "alias").symlink_to(snapshot)
    for root in (snapshot, tmp_path / "alias"):
        check_link(root, "file")
        check_link(root, "base/file")
        check_link(root / "base", "file")


@pytest.mark.parametrize("target", ["../../refs/main", "../other/file", "../../../models--org--other/blobs/1"])
def test_other_places_of_the_cache_are_not_followed(snapshot, target):
    (snapshot / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match="link is a symbolic link"):
        check_link(snapshot, "link")


def test_blobs_that_are_links_out_of_the_cache_are_not_followed(snapshot, tmp_path):
    (tmp_path / "secret").write_text("text")
    (snapshot.parent.parent / "blobs" / "3").symlink_to(tmp_path / "secret")
    (snapshot / "link").symlink_to("../../blobs/3")
    with pytest.raises(CheckpointError, match="secret, which is not a file of"):
        check_link(snapshot, "link")
