"""The Hub double's responses to the requests that `huggingface_hub` sends."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from urllib.parse import parse_qs

import yaml

from support.hub_storage import Blob, Commit, Refusal, Repository, is_large

OWNER_TOKEN = "hf_owner"  # the token of user `me`, who may write to `me/...` and `team/...`
STRANGER_TOKEN = "hf_stranger"  # the token of a user who may write to neither
EXPIRED_TOKEN = "hf_expired"
USERS = {OWNER_TOKEN: "me", STRANGER_TOKEN: "stranger"}
TEAMS = {"me": ["team"]}


class Requests:
    """A mixin of the request handler: one method for each route, which returns status, content and headers."""

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
    ("GET", r"/api/whoami-v2", Requests.whoami),
    ("POST", r"/api/repos/create", Requests.create),
    ("POST", r"/api/validate-yaml", Requests.validate_yaml),
    ("GET", rf"/api/models/{REPOSITORY}(?:/revision/([^/]+))?", Requests.model_info),
    ("GET", rf"/api/models/{REPOSITORY}/tree/([^/]+)(?:/(.+))?", Requests.tree),
    ("GET", rf"/api/models/{REPOSITORY}/refs", Requests.refs),
    ("GET", rf"/api/models/{REPOSITORY}/auth-check(/write)?", Requests.auth_check),
    ("GET", rf"/api/models/{REPOSITORY}/discussions", Requests.discussions),
    ("POST", rf"/api/models/{REPOSITORY}/paths-info/([^/]+)", Requests.paths_info),
    ("POST", rf"/api/models/{REPOSITORY}/branch/([^/]+)", Requests.create_branch),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/([^/]+)", Requests.preupload),
    ("POST", rf"/api/models/{REPOSITORY}/lfs-files/duplicate", Requests.duplicate),
    ("POST", rf"/api/models/{REPOSITORY}/commit/([^/]+)", Requests.make_commit),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Requests.lfs_batch),
    ("PUT", OBJECT, Requests.put_object),
    ("PUT", rf"{OBJECT}/(\d+)", Requests.put_part),
    ("POST", rf"{OBJECT}/complete", Requests.complete_object),
    ("POST", rf"{OBJECT}/verify", Requests.verify_object),
    ("GET HEAD", rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", Requests.resolve),
    ("GET HEAD", rf"/cdn/{REPOSITORY}/([0-9a-f]{{64}})/(.+)", Requests.cdn),
]
