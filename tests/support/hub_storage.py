"""Repositories of the Hub double: their files, commits and object stores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".onnx_data")
LFS_BYTES = 1_000_000  # a file of more bytes is a large file, whatever its name


@dataclass(frozen=True)
class Blob:
    """The content of one file.

    Attributes:
        content: the bytes.
        is_lfs: whether it is a large file, in the object store, and not a regular file of the repository.
    """

    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        """Digest of the content; the name of a large file in the object store."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def xet_hash(self) -> str:
        """The digest by which the Hub copies large files; here the sha256 backwards, to tell the two apart."""
        return self.sha256[::-1]

    @cached_property
    def oid(self) -> str:
        """The git object id of the content; for a large file, of the pointer to it."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = text.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def tree_entry(self, path: str) -> dict:
        """The file's entry in a tree listing."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
            entry["xetHash"] = self.xet_hash
        return entry


@dataclass
class Commit:
    """One state of a repository: all its files by name."""

    files: dict[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repository:
    """A model repository.

    Attributes:
        name: such as `me/model`.
        private: whether only users who may write can read it.
        commits: by id.
        refs: commit ids by branch or pull request, such as `main` and `refs/pr/1`.
        objects: contents of large files by sha256.
    """

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], title: str, ref: str = "main") -> str:
        """Add a commit to a branch; returns the commit's id."""
        parent = self.refs.get(ref)
        sha = hashlib.sha1(f"{self.name} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(files, title, parent)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The id of the commit that a branch or an id names; None if there is none."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents of all files at a revision, by name."""
        sha = self.resolve(revision)
        assert sha is not None, revision
        return {name: blob.content for name, blob in self.commits[sha].files.items()}


class Refusal(Exception):  # noqa: N818
    """An error response, with the Hub's message and error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def is_large(path: str, size: int) -> bool:
    """Whether the Hub stores a file in the object store."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES
