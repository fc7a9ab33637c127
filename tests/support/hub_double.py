"""A double of the Hub on the loopback interface, for the real client `huggingface_hub`.

It has what the real Hub has: repositories with commits, branches and pull requests, and for each repository an object
store for large files. It answers the client's requests, and fails where a test asks for a failure.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_requests import ROUTES, Requests
from support.hub_storage import Blob, Refusal, Repository, is_large


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
        # It looks for a shutdown twice a second by default, so that every test would wait for that at its end.
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

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


class Handler(Requests, BaseHTTPRequestHandler):
    """Reads a request, lets it fail if a fault matches, and calls the method of its route."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for an acknowledgement, 40 ms
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
