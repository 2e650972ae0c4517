"""A Hub on loopback for the tests: repositories, branches, pull requests, large files (LFS and xet), refusals, cuts.

Huggingface_hub and Transformers talk to it with their own code. It keeps everything in memory but for xet, whose
client writes to a folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")


@dataclass(frozen=True)
class Entry:
    """A file of a commit: where its bytes are, and whether it is a large one."""

    sha256: str
    size: int
    large: bool


@dataclass
class Repository:
    """Commits by id, and what branches and pull requests point at."""

    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, Entry], title: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[name] = files
        self.refs[ref] = name
        self.titles.append(title)
        return name

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Start with `with HubServer(folder) as hub`; `hub.url` is the endpoint.

    Args:
        folder: for xet's client.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, Repository] = {}
        # Tokens and the accounts that they belong to; an account writes to its own repositories.
        self.accounts = {"hf_owner": "me", "hf_guest": "guest"}
        self.log: list[tuple[str, str]] = []
        self.cuts = 0  # so many uploads of a large file are cut in the middle
        self.broken_commits = 0  # so many commits are answered with an error
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        self.blobs[name] = content
        return name

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Entry]:
        """What a revision of a repository holds."""
        repository = self.repositories[repo_id]
        commit = repository.resolve(revision)
        assert commit is not None, f"no revision {revision!r}; there are {sorted(repository.refs)}"
        return repository.commits[commit]

    def text(self, repo_id: str, name: str, revision: str = "main") -> str:
        return self.blobs[self.files(repo_id, revision)[name].sha256].decode()

    def edit(self, repo_id: str, files: dict[str, str | bytes], revision: str = "main", private: bool = False) -> str:
        """As somebody on the website does; makes the repository where there is none."""
        repository = self.repositories.get(repo_id) or self.create(repo_id, private)
        content = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        new = {name: Entry(self.put(data), len(data), name.endswith(LARGE)) for name, data in content.items()}
        return repository.commit(revision, {**self.files(repo_id, revision), **new}, "edit on the website")

    def create(self, repo_id: str, private: bool) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.commit("main", {".gitattributes": Entry(self.put(attributes), len(attributes), False)}, "initial")
        return repository

    def xet_hash(self, sha256: str) -> str | None:
        """The name that xet's client has given a file, from the shards that it wrote."""

        def as_hex(raw: bytes) -> str:
            return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))

        for shard in (self.folder / "cas").glob("xet/xorbs/shards/*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                name = data[at : at + 32]
                flags, count = struct.unpack("<II", data[at + 32 : at + 40])
                at += 48 + 48 * count * (2 if flags >> 31 else 1)
                if flags >> 30 & 1:
                    if as_hex(data[at : at + 32]) == sha256:
                        return as_hex(name)
                    at += 48
        return None


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """The class that answers for one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Requests are in `hub.log`."""

        def handle_one(self) -> None:
            self._body: bytes | None = None
            parts = urlsplit(self.path)
            path, self.query = unquote(parts.path), parse_qs(parts.query)
            hub.log.append((self.command, path))
            try:
                for methods, pattern, answer in _ROUTES:
                    found = re.fullmatch(pattern, path)
                    if found and self.command in methods:
                        answer(hub, self, *found.groups())
                        return
                raise _Refusal(404, "NotFound", f"no route {self.command} {path}")
            except _Refusal as refusal:
                self.read()
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
                self.answer({"error": str(refusal)}, refusal.status, headers)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

        def read(self) -> bytes:
            """The request's body."""
            if self._body is not None:
                return self._body
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                body = b""
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._body = body
            return body

        def answer(self, body: Any = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            for name, value in {"Content-Length": str(len(data)), "Content-Type": kind, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        @property
        def account(self) -> str | None:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if given and given not in hub.accounts:
                raise _Refusal(401, "", "Invalid credentials in Authorization header")
            return hub.accounts.get(given)

        def repository(self, repo_id: str, *, write: bool = False) -> Repository:
            account, found = self.account, hub.repositories.get(repo_id)
            owner = repo_id.split("/")[0]
            if found is None or (found.private and account != owner):
                # Whether there is one is not for everybody to know.
                raise _Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
            if write and account is None:
                raise _Refusal(401, "", "Invalid username or password.")
            if write and account != owner:
                raise _Refusal(403, "", "Forbidden: you must be the owner")
            return found

        def revision(self, repo_id: str, revision: str) -> tuple[str, dict[str, Entry]]:
            repository = self.repository(repo_id)
            commit = repository.resolve(unquote(revision))
            if commit is None:
                raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit, repository.commits[commit]

    return Handler


def _whoami(hub: HubServer, request: Any) -> None:
    if request.account is None:
        raise _Refusal(401, "", "Invalid username or password.")
    request.answer({"type": "user", "name": request.account, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def _create(hub: HubServer, request: Any) -> None:
    wanted = json.loads(request.read())
    if request.account is None:
        raise _Refusal(401, "", "Invalid username or password.")
    repo_id = f"{wanted.get('organization') or request.account}/{wanted['name']}"
    if repo_id in hub.repositories:
        request.answer({"error": "You already created this model repo", "url": f"{hub.url}/{repo_id}"}, 409)
        return
    if repo_id.split("/")[0] != request.account:
        raise _Refusal(403, "", "You don't have the rights to create a model under this namespace")
    hub.create(repo_id, wanted.get("visibility") == "private" or bool(wanted.get("private")))
    request.answer({"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id})


def _preupload(hub: HubServer, request: Any, repo_id: str, revision: str) -> None:
    wants_pr = "create_pr" in request.query
    request.repository(repo_id, write=not wants_pr)
    _, there = request.revision(repo_id, revision)
    answers = []
    for file in json.loads(request.read())["files"]:
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        entry = there.get(file["path"])
        answers.append(
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": entry and _oid(hub, entry)}
        )
    request.answer({"files": answers})


def _batch(hub: HubServer, request: Any, repo_id: str) -> None:
    request.repository(repo_id)
    objects = []
    for wanted in json.loads(request.read())["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if wanted["oid"] not in hub.blobs:
            answer["actions"] = {"upload": {"href": f"{hub.url}/__lfs/{wanted['oid']}", "header": {}}}
        objects.append(answer)
    request.answer({"transfer": "basic", "objects": objects})


def _receive(hub: HubServer, request: Any, oid: str) -> None:
    with hub.lock:
        cut, hub.cuts = hub.cuts > 0, max(0, hub.cuts - 1)
    if cut:
        request.rfile.read(int(request.headers["Content-Length"]) // 2)
        request.close_connection = True
        request.connection.close()
        return
    if hub.put(request.read()) != oid:
        raise _Refusal(400, "BadRequest", "the bytes do not have the hash that was announced")
    request.answer()


def _commit(hub: HubServer, request: Any, repo_id: str, revision: str) -> None:
    wants_pr = "create_pr" in request.query
    repository = request.repository(repo_id, write=not wants_pr)
    lines = [json.loads(line) for line in request.read().decode().splitlines()]
    with hub.lock:
        if hub.broken_commits:
            hub.broken_commits -= 1
            raise _Refusal(500, "", "Internal error")
        _, files = request.revision(repo_id, revision)
        files, title = dict(files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Entry(hub.put(content), len(content), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs and hub.xet_hash(value["oid"]) is None:
                    raise _Refusal(400, "BadRequest", f"large file {value['path']} has not arrived")
                files[value["path"]] = Entry(value["oid"], value["size"], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refusal(400, "BadRequest", f"unknown operation {line['key']}")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        ref = f"refs/pr/{number}" if wants_pr else unquote(revision)
        commit = repository.commit(ref, files, title)
    answer = {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo_id}/commit/{commit}"}
    if wants_pr:
        answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{number}"
    request.answer(answer)


def _branch(hub: HubServer, request: Any, repo_id: str, name: str) -> None:
    repository = request.repository(repo_id, write=True)
    start = json.loads(request.read() or b"{}").get("startingPoint") or "main"
    if name in repository.refs:
        raise _Refusal(409, "", "Reference already exists")
    repository.refs[name] = request.revision(repo_id, start)[0]
    request.answer({})


def _refs(hub: HubServer, request: Any, repo_id: str) -> None:
    refs = request.repository(repo_id).refs

    def listed(pulls: bool) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": name if pulls else f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in refs.items()
            if name.startswith("refs/pr/") is pulls
        ]

    request.answer({"branches": listed(False), "tags": [], "converts": [], "pullRequests": listed(True)})


def _oid(hub: HubServer, entry: Entry) -> str:
    if entry.large:
        return entry.sha256
    return hashlib.sha1(b"blob %d\0" % entry.size + hub.blobs[entry.sha256]).hexdigest()


def _listed(hub: HubServer, name: str, entry: Entry) -> dict[str, Any]:
    listed: dict[str, Any] = {"type": "file", "path": name, "size": entry.size, "oid": _oid(hub, entry)[:40]}
    if entry.large:
        listed["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
    return listed


def _tree(hub: HubServer, request: Any, repo_id: str, revision: str) -> None:
    _, files = request.revision(repo_id, revision)
    request.answer([_listed(hub, name, files[name]) for name in sorted(files)])


def _paths(hub: HubServer, request: Any, repo_id: str, revision: str) -> None:
    _, files = request.revision(repo_id, revision)
    body = request.read().decode()
    wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
    request.answer([_listed(hub, name, files[name]) for name in wanted if name in files])


def _info(hub: HubServer, request: Any, repo_id: str, revision: str | None = None) -> None:
    commit, files = request.revision(repo_id, revision or "main")
    request.answer(
        {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": hub.repositories[repo_id].private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in sorted(files)],
        }
    )


def _xet_token(hub: HubServer, request: Any, repo_id: str) -> None:
    expiry = int(time.time()) + 3600
    place = f"local://{(hub.folder / 'cas').absolute()}"
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(expiry)}
    request.answer({"casUrl": place, "accessToken": "x", "exp": expiry}, headers=headers)


def _resolve(hub: HubServer, request: Any, repo_id: str, revision: str, name: str) -> None:
    commit, files = request.revision(repo_id, revision)
    entry = files.get(name)
    if entry is None:
        headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
        request.answer({"error": "Entry not found"}, 404, headers)
        return
    etag = f'"{_oid(hub, entry)}"'
    headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if entry.large:
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)}
    if entry.sha256 not in hub.blobs:
        headers["X-Xet-Hash"] = hub.xet_hash(entry.sha256) or ""
        token = f"{hub.url}/api/models/{repo_id}/xet-read-token/{commit}"
        headers["Link"] = f'<{token}>; rel="xet-auth", <{hub.url}/x>; rel="xet-reconstruction-info"'
        if request.command == "GET":
            raise _Refusal(410, "", "only through xet")
        request.answer(headers=headers | {"Content-Length": str(entry.size)})
        return
    data = hub.blobs[entry.sha256]
    part = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if part and request.command == "GET":
        start, end = int(part[1]), int(part[2] or len(data) - 1)
        request.answer(data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})
    else:
        request.answer(data, headers=headers)


_MODEL = r"/api/models/([^/]+/[^/]+)"
_ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("GET",), r"/api/whoami-v2", _whoami),
    (("POST",), r"/api/repos/create", _create),
    (("POST",), r"/api/validate-yaml", lambda hub, request: (request.read(), request.answer({"warnings": []}))[1]),
    (("POST",), rf"{_MODEL}/preupload/(.+)", _preupload),
    (("POST",), rf"{_MODEL}/commit/(.+)", _commit),
    (("POST",), rf"{_MODEL}/branch/(.+)", _branch),
    (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
    (("PUT",), r"/__lfs/([0-9a-f]{64})", _receive),
    (("GET",), rf"{_MODEL}/xet-(?:read|write)-token/.+", _xet_token),
    (("GET",), rf"{_MODEL}/refs", _refs),
    (("GET",), rf"{_MODEL}/tree/(refs/pr/\d+|[^/]+)", _tree),
    (("POST",), rf"{_MODEL}/paths-info/(.+)", _paths),
    (("GET",), rf"{_MODEL}/revision/(.+)", _info),
    (("GET",), _MODEL, _info),
    (("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", _resolve),
)
