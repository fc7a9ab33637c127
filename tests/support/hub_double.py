"""A double of the Hub on the loopback interface, for the real client `huggingface_hub`.

It has what the real Hub has: repositories with commits, branches and pull requests, and for each repository an object
store for large files. It answers the client's requests, and fails where a test asks for a failure.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER_TOKEN = "hf_owner"  # the token of user `me`, who may write to `me/...` and `team/...`
STRANGER_TOKEN = "hf_stranger"  # the token of a user who may write to neither
EXPIRED_TOKEN = "hf_expired"
USERS = {OWNER_TOKEN: "me", STRANGER_TOKEN: "stranger"}
TEAMS = {"me": ["team"]}

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


@dataclass
class Fault:
    """A failure of the next `times` requests that match.

    Attributes:
        method, pattern: regular expressions for the whole method and for a part of the path.
        times: how many requests fail.
        status, code, message: the HTTP status, and the Hub's error code and message, of the response.
        headers: of that response.
        drop: True closes the connection instead of answering; "late" carries out the request first.
        drop_after_bytes: close the connection after this many bytes of the request's body.
        delay: seconds to wait first.
    """

    method: str
    pattern: str
    times: int = 1
    status: int | None = None
    code: str | None = None
    message: str | None = None
    headers: dict = field(default_factory=dict)
    drop: bool | str = False
    drop_after_bytes: int | None = None
    delay: float = 0.0


class HubDouble(ThreadingHTTPServer):
    """The Hub; it serves from the moment of its creation.

    Attributes:
        repositories: by name.
        sent: number of bytes of file contents sent so far, by file name.
        received: number of bytes of large files received so far, by sha256, unfinished uploads included.
        asked: all requests so far, as (method, path).
        part_bytes: the client must upload larger files in parts of this size; None for never.
        quota_bytes: size limit of a repository's object store; None for no limit.
        has_xet: whether large files have the digest that copying needs.
        takes_gitignore: whether an upload may override the repository's .gitignore.
        failed_copies: the reason for which every copy fails; None to let copies succeed.
    """

    daemon_threads = True
    part_bytes: int | None = None
    quota_bytes: int | None = None
    has_xet = True
    takes_gitignore = True
    failed_copies: str | None = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.sent: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, root: Path, *, private: bool = False) -> str:
        """Commit exactly the files of a directory to `main` of a repository; returns the commit's id."""
        self.repositories.setdefault(name, Repository(name, private))
        paths = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        return self.commit(name, {path: file.read_bytes() for path, file in paths.items()})

    def commit(self, name: str, contents: dict[str, bytes], ref: str = "main") -> str:
        """Commit exactly these files, as another user would; returns the commit's id."""
        repository = self.repositories.setdefault(name, Repository(name))
        files = {path: Blob(content, is_large(path, len(content))) for path, content in contents.items()}
        repository.objects |= {blob.sha256: blob.content for blob in files.values() if blob.is_lfs}
        return repository.commit(files, "by someone else", ref)

    def fail(self, method: str, pattern: str, **fault) -> None:
        """Let the next matching requests fail; see `Fault` for the arguments."""
        self.faults.append(Fault(method, pattern, **fault))

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault for this request, which then counts once less; None to let the request succeed."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request, client_address):
        """Print nothing: tests kill clients on purpose."""


class Refusal(Exception):  # noqa: N818
    """An error response, with the Hub's message and error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def is_large(path: str, size: int) -> bool:
    """Whether the Hub stores a file in the object store."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets it fail if a fault matches, and calls the method of its route."""

    protocol_version = "HTTP/1.1"
    server: HubDouble

    def log_message(self, *arguments):
        """Print nothing."""

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def do_PUT(self):
        self.respond()

    def respond(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.asked.append((self.command, url.path))
        fault = self.server.next_fault(self.command, url.path)
        if fault is not None:
            time.sleep(fault.delay)
            if fault.drop is True or fault.drop_after_bytes is not None:
                return self.drop(self.read_body(fault.drop_after_bytes or 0))
        self.body = self.read_body()
        if fault is not None and fault.status is not None:
            return self.refuse(Refusal(fault.status, fault.message or "injected", fault.code), fault.headers)
        try:
            answer = self.route(url.path)
        except Refusal as refusal:
            return self.refuse(refusal, {})
        if fault is not None and fault.drop == "late":
            return self.drop()
        return self.answer(*answer)

    def route(self, path: str):
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return function(self, *(unquote(part) if part is not None else None for part in match.groups()))
        raise Refusal(404, f"no route {self.command} {path}")

    def read_body(self, limit: int | None = None) -> bytes:
        """The request's body, or its first `limit` bytes; counts the bytes of large files as they arrive."""
        chunks, total = [], 0
        for chunk in self.body_chunks():
            kept = chunk if limit is None else chunk[: limit - total]
            chunks.append(kept)
            total += len(kept)
            self.count_received(len(kept))
            if limit is not None and total >= limit:
                break
        return b"".join(chunks)

    def count_received(self, count: int) -> None:
        upload = re.fullmatch(r"/objects/.+/([0-9a-f]{64})(?:/\d+)?", urlsplit(self.path).path)
        if upload and self.command == "PUT":
            with self.server.lock:
                self.server.received[upload[1]] = self.server.received.get(upload[1], 0) + count

    def body_chunks(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read(min(left, 65536))
            if not chunk:
                raise ConnectionError("the client went away")
            left -= len(chunk)
            yield chunk

    def drop(self, _read: bytes = b""):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, refusal: Refusal, headers: dict):
        headers = {"X-Error-Message": str(refusal), **headers}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.answer(refusal.status, {"error": str(refusal)}, headers)

    def answer(self, status: int, content=b"", headers: dict | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self) -> str | None:
        """The user of the request's token; None without a token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def may_write(self, name: str) -> bool:
        namespace = name.split("/")[0]
        return self.user is not None and (namespace == self.user or namespace in TEAMS.get(self.user, []))

    def readable(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        user = self.user
        if repository is None or (repository.private and not self.may_write(name)):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, name: str) -> Repository:
        repository = self.readable(name)
        if not self.may_write(name):
            raise Refusal(403, "you need to have write access to this repository")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> tuple[str, Commit]:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # Accounts and repositories

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        teams = [{"type": "org", "name": team} for team in TEAMS.get(self.user, [])]
        return 200, {"type": "user", "name": self.user, "orgs": teams, "auth": {"type": "access_token"}}

    def create(self):
        values = json.loads(self.body)
        name = f"{values.get('organization') or self.user}/{values['name']}"
        if not self.may_write(name):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        with self.server.lock:
            if name in self.server.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            private = values.get("visibility") == "private" or bool(values.get("private"))
            repository = self.server.repositories[name] = Repository(name, private)
            attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", is_lfs=False)
            repository.commit({".gitattributes": attributes}, "initial commit")
        return 200, {"url": f"{self.server.url}/{name}", "name": name, "id": name}

    def create_branch(self, name, branch):
        repository = self.writable(name)
        if branch in repository.refs:
            raise Refusal(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = self.commit_of(repository, start)[0]
        return 200, {}

    def refs(self, name):
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in self.readable(name).refs.items()
        ]
        return 200, {"branches": branches, "tags": [], "converts": []}

    def auth_check(self, name, write):
        if write:
            self.writable(name)
        else:
            self.readable(name)
        return 200, {}

    def discussions(self, name):
        repository = self.readable(name)
        return 200, {"discussions": [], "count": 0, "start": 0, "numClosedDiscussions": 0, "repo": repository.name}

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        head = re.match(r"---\r?\n(.*?)\n---", content, re.DOTALL)
        try:
            values = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        errors = [] if isinstance(values, dict) else [{"message": "the metadata is not a mapping"}]
        if not errors and not isinstance(values.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    # Reading

    def model_info(self, name, revision):
        repository = self.readable(name)
        sha, commit = self.commit_of(repository, revision or "main")
        siblings = [
            {"rfilename": path, "size": len(blob.content), "blobId": blob.oid}
            | ({"lfs": {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": 134}} if blob.is_lfs else {})
            for path, blob in commit.files.items()
        ]
        return 200, {
            "id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": [], "downloads": 0,
        }  # fmt: skip

    def tree(self, name, revision, folder):
        _, commit = self.commit_of(self.readable(name), revision)
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in commit.files if path.startswith(prefix)]
        if folder and not paths:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        own = [path for path in paths if is_recursive or "/" not in path.removeprefix(prefix)]
        return 200, [commit.files[path].tree_entry(path) for path in own]

    def paths_info(self, name, revision):
        _, commit = self.commit_of(self.readable(name), revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        entries = [commit.files[path].tree_entry(path) for path in paths if path in commit.files]
        if not self.server.has_xet:
            for entry in entries:
                entry.pop("xetHash", None)
        return 200, entries

    def resolve(self, name, revision, path):
        repository = self.readable(name)
        sha, commit = self.commit_of(repository, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.is_lfs:
            # Another host, as on the real Hub: the client follows redirects to the same host immediately.
            location = f"{self.server.url.replace('127.0.0.1', 'localhost')}/cdn/{name}/{blob.sha256}/{path}"
            linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            return 302, b"", {**headers, **linked, "Location": location}
        return self.content(path, blob.content, {**headers, "ETag": f'"{blob.oid}"'})

    def cdn(self, name, oid, path):
        content = self.server.repositories[name].objects.get(oid)
        if content is None:  # a large file that another user committed
            content = next(
                blob.content
                for commit in self.server.repositories[name].commits.values()
                for blob in commit.files.values()
                if blob.is_lfs and blob.sha256 == oid
            )
        return self.content(path, content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def content(self, path, content, headers):
        status = 200
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if ranged:
            start, end = int(ranged[1]), min(int(ranged[2] or len(content)), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content, status = content[start : end + 1], 206
        if self.command == "GET":
            with self.server.lock:
                self.server.sent[path] = self.server.sent.get(path, 0) + len(content)
        return status, content, headers

    # Writing

    def preupload(self, name, revision):
        repository = self.readable(name) if "create_pr" in self.query else self.writable(name)
        _, commit = self.commit_of(repository, revision)
        values = json.loads(self.body)
        gitignore = values.get("gitIgnore")
        if gitignore is None or not self.server.takes_gitignore:
            gitignore = commit.files[".gitignore"].content.decode() if ".gitignore" in commit.files else ""
        ignored = [line.strip().replace("*", "") for line in gitignore.splitlines() if line.strip()]
        answers = []
        for file in values["files"]:
            path, blob = file["path"], commit.files.get(file["path"])
            mode = "lfs" if is_large(path, file["size"]) else "regular"
            oid = None if blob is None else (blob.sha256 if blob.is_lfs else blob.oid)
            is_ignored = any(path.endswith(ending) for ending in ignored)
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": is_ignored, "oid": oid})
        return 200, {"files": answers}

    def lfs_batch(self, name):
        repository = self.readable(name)
        if self.user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        objects = [self.lfs_object(repository, each["oid"], each["size"]) for each in json.loads(self.body)["objects"]]
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_object(self, repository: Repository, oid: str, size: int) -> dict:
        known = {"oid": oid, "size": size}
        if oid in repository.objects:
            return known
        used = sum(map(len, repository.objects.values()))
        if self.server.quota_bytes is not None and used + size > self.server.quota_bytes:
            return {**known, "error": {"code": 403, "message": "Private repository storage limit reached"}}
        place = f"{self.server.url}/objects/{repository.name}/{oid}"
        upload: dict = {"href": place}
        if self.server.part_bytes is not None and size > self.server.part_bytes:
            count = -(-size // self.server.part_bytes)
            parts = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{place}/complete", "header": {"chunk_size": str(self.server.part_bytes), **parts}}
        return {**known, "actions": {"upload": upload, "verify": {"href": f"{place}/verify"}}}

    def put_object(self, name, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the digest that was announced")
        self.server.repositories[name].objects[oid] = self.body
        return 200, b""

    def put_part(self, _name, oid, number):
        self.server.parts[oid, int(number)] = self.body
        return 200, b"", {"ETag": f'"{number}"'}

    def complete_object(self, name, oid):
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(self.server.parts[oid, number] for number in numbers)
        return self.put_object(name, oid)

    def verify_object(self, name, oid):
        if len(self.server.repositories[name].objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refusal(404, "no such object")
        return 200, {}

    def duplicate(self, name):
        source, values = self.readable(name), json.loads(self.body)
        target = self.writable(values["target"]["name"])
        if self.server.failed_copies:
            failed = [{"sha256": file["sha256"], "error": self.server.failed_copies} for file in values["files"]]
            return 200, {"success": [], "failed": failed}
        for file in values["files"]:
            assert file["xetHash"] == file["sha256"][::-1]
            target.objects[file["sha256"]] = source.objects[file["sha256"]]
        return 200, {"success": [file["sha256"] for file in values["files"]], "failed": []}

    def make_commit(self, name, revision):
        is_pull_request = "create_pr" in self.query
        repository = self.readable(name) if is_pull_request else self.writable(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.server.lock:
            head, commit = self.commit_of(repository, revision)
            if header.get("parentCommit", head) != head:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(commit.files)
            for line in lines[1:]:
                self.change(repository, files, line["key"], line["value"])
            ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repository.refs)}"
            if is_pull_request:
                repository.refs[ref] = head
            sha = repository.commit(files, header["summary"], ref if is_pull_request else revision)
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{ref.rsplit('/', 1)[1]}"
        return 200, answer

    def change(self, repository: Repository, files: dict[str, Blob], key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repository.objects:
                raise Refusal(400, f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = Blob(repository.objects[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
        else:
            raise Refusal(400, f"no operation {key}")


REPOSITORY = r"([^/]+/[^/]+)"
OBJECT = rf"/objects/{REPOSITORY}/([0-9a-f]{{64}})"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{REPOSITORY}(?:/revision/([^/]+))?", Handler.model_info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("GET", rf"/api/models/{REPOSITORY}/refs", Handler.refs),
    ("GET", rf"/api/models/{REPOSITORY}/auth-check(/write)?", Handler.auth_check),
    ("GET", rf"/api/models/{REPOSITORY}/discussions", Handler.discussions),
    ("POST", rf"/api/models/{REPOSITORY}/paths-info/([^/]+)", Handler.paths_info),
    ("POST", rf"/api/models/{REPOSITORY}/branch/([^/]+)", Handler.create_branch),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{REPOSITORY}/lfs-files/duplicate", Handler.duplicate),
    ("POST", rf"/api/models/{REPOSITORY}/commit/([^/]+)", Handler.make_commit),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", OBJECT, Handler.put_object),
    ("PUT", rf"{OBJECT}/(\d+)", Handler.put_part),
    ("POST", rf"{OBJECT}/complete", Handler.complete_object),
    ("POST", rf"{OBJECT}/verify", Handler.verify_object),
    ("GET HEAD", rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET HEAD", rf"/cdn/{REPOSITORY}/([0-9a-f]{{64}})/(.+)", Handler.cdn),
]
