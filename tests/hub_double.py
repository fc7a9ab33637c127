"""A stand-in for the Hub on the loopback interface: enough for the real client to resolve, download and be refused."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "org/gated": (403, "GatedRepo"),
    "org/missing": (404, "RepoNotFound"),
    "org/broken": (451, None),  # the client tries statuses of 500 and more again, for half a minute
}


class HubDouble(ThreadingHTTPServer):
    """Serves the directory `root` as the model `org/model`, whose `main` is commit `SHA`.

    Attributes:
        sent: bytes of file contents sent so far, by file name.
        model_info_status: HTTP status of the answer to what the model is.
    """

    model_info_status = 200

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.sent: dict[str, int] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Its endpoint, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubDouble

    def log_message(self, *arguments):
        """Be quiet."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        for repo, (status, code) in REFUSALS.items():
            if path.startswith((f"/api/models/{repo}", f"/{repo}/")):
                return self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        info = re.fullmatch(r"/api/models/org/model(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/org/model/resolve/([^/]+)/(.+)", path)
        if info and info[1] in (None, "main", SHA):
            return self.answer(self.server.model_info_status, json.dumps(self.model_info()).encode())
        if file and file[1] in ("main", SHA) and (self.server.root / file[2]).is_file():
            return self.answer_file(file[2])
        known = file is not None and file[1] in ("main", SHA)
        code = "EntryNotFound" if known else "RevisionNotFound"
        return self.answer(404, b"{}", {"X-Error-Code": code})

    def model_info(self):
        siblings = []
        for path in sorted(self.server.root.rglob("*")):
            if path.is_file():
                sibling = {"rfilename": path.relative_to(self.server.root).as_posix(), "size": path.stat().st_size}
                if path.suffix == ".safetensors":
                    sibling["lfs"] = {"sha256": digest(path), "size": path.stat().st_size, "pointerSize": 130}
                siblings.append(sibling)
        return {"id": "org/model", "sha": SHA, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def answer_file(self, name):
        path = self.server.root / name
        content, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest(path)}"', "Accept-Ranges": "bytes"}
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if ranged:
            start, end = int(ranged[1]), min(int(ranged[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(content)
        self.answer(status, content, headers)

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
