"""A stand-in for the Hugging Face Hub's write API, on loopback, as huggingface_hub 2.4 calls it.

No Hub: it knows model repos, branches, LFS uploads (basic and multipart) and commits, and keeps the
bytes in memory. It does not speak Xet, which the tests switch off (HF_HUB_DISABLE_XET). Its answers
follow what the client's source expects.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "stand" * 7 + "in"
CHUNK_NBYTES = 2**18  # larger files are sent in parts of this size
_PAGE = 3  # entries of a listing's page: small, so that paging is exercised
# The first two are signed URLs in reality.
_OPEN_TO_ALL = ("/storage/", "/complete/", "/api/validate-yaml")
_LFS_SUFFIXES = (".safetensors", ".png")


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": hashlib.sha256(self.data).hexdigest(), "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class Hub:
    """The state, and what tests look at: ``sent`` lists the name or oid of each upload, ``requests`` all requests.

    ``fault`` may answer a request instead (a status), or do something first and return None.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str, str], int | None] = lambda method, path: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Return path -> content at the head of a branch, less .gitattributes."""
        head = self.repos[repo_id].branches[branch][-1]
        return {path: blob.data for path, blob in head.files.items() if not path.startswith(".")}

    def commits(self, repo_id: str, branch: str = "main") -> list[tuple[str, set[str]]]:
        """Return (title, names added or changed or removed) of each commit but the first."""
        history = self.repos[repo_id].branches[branch]
        return [
            (
                after.title,
                {
                    name
                    for name in before.files.keys() | after.files.keys()
                    if before.files.get(name) != after.files.get(name)
                },
            )
            for before, after in pairwise(history)
        ]

    def create(self, repo_id: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> None:
        """Make a repo as the Hub does, with a first commit, and perhaps some content."""
        repo = self.repos[repo_id] = Repo(private, {"main": []})
        self.add_commit(repo, "main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        if files:
            blobs = {path: Blob(data, path.endswith(_LFS_SUFFIXES)) for path, data in files.items()}
            self.add_commit(repo, "main", "by hand", repo.branches["main"][-1].files | blobs)

    def add_commit(self, repo: Repo, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        text = json.dumps([title, len(repo.branches[branch]), sorted((p, b.git_oid) for p, b in files.items())])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, files)
        repo.branches[branch].append(commit)
        return commit


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Yield a hub that answers on loopback until the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refusal(Exception):
    """An answer other than 200; ``code`` is the X-Error-Code that the client tells cases apart by."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message
        super().__init__(message)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.hub.requests.append(f"{self.command} {path}")
        body = self._read_body()
        headers: dict[str, str] = {}
        try:
            if status := self.hub.fault(self.command, path):
                raise _Refusal(status)
            status, value = 200, self._route(path, query, body, headers)
        except _Refusal as refusal:
            status, value = refusal.status, {"error": refusal.message}
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str, query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command.replace("HEAD", "GET") and match:
                if not path.startswith(_OPEN_TO_ALL):
                    self._check_token(writes=method != "GET")
                with self.hub.lock:
                    return handle(self.hub, match, query, body, headers)
        raise _Refusal(404, "", f"no such route: {self.command} {path}")

    def _check_token(self, *, writes: bool) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given != TOKEN and (writes or given):
            raise _Refusal(401, "", "Invalid username or password.")


def _repo(hub: Hub, repo_id: str) -> Repo:
    if repo_id not in hub.repos:
        raise _Refusal(404, "RepoNotFound", "Repository not found")
    return hub.repos[repo_id]


def _commit_at(hub: Hub, match: re.Match[str]) -> Commit:
    commit = _repo(hub, match["repo"]).find(match["rev"])
    if commit is None:
        raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
    return commit


def _create_repo(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    wish = json.loads(body)
    repo_id = f"{wish['organization']}/{wish['name']}"
    if wish["organization"] == "others":
        raise _Refusal(403, "", "You don't have the rights to create a model under this namespace")
    if repo_id in hub.repos:
        raise _Refusal(409, "", "You already created this model repo")
    hub.create(repo_id, private=wish.get("visibility") == "private" or wish.get("private", False))  # 2.x or 1.x
    return {"url": f"{hub.url}/{repo_id}", "name": repo_id}


def _info(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    commit = _commit_at(hub, match) if "rev" in match.groupdict() else _repo(hub, match["repo"]).find("main")
    assert commit is not None
    return {"id": match["repo"], "sha": commit.oid, "private": _repo(hub, match["repo"]).private, "siblings": []}


def _auth_check(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    _repo(hub, match["repo"])
    if match["repo"].startswith("others/"):
        raise _Refusal(403, "", "Forbidden")
    return {}


def _tree(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    commit, start = _commit_at(hub, match), int(query.get("cursor", 0))
    folders = {path.rpartition("/")[0] for path in commit.files} - {""}
    entries = [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
    entries += [blob.entry(path) for path, blob in sorted(commit.files.items())]
    if start + _PAGE < len(entries):
        here = f"{hub.url}/api/models/{match['repo']}/tree/{match['rev']}"
        headers["Link"] = f'<{here}?recursive=True&cursor={start + _PAGE}>; rel="next"'
    return entries[start : start + _PAGE]


def _file(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    commit = _commit_at(hub, match)
    if match["path"] not in commit.files:
        raise _Refusal(404, "EntryNotFound", "Entry not found")
    blob = commit.files[match["path"]]
    headers.update({"ETag": f'"{blob.git_oid}"', "X-Repo-Commit": commit.oid})
    return blob.data


def _history(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    date = "2026-01-01T00:00:00.000Z"
    commits = _repo(hub, match["repo"]).branches[match["rev"]]
    return [{"id": c.oid, "title": c.title, "message": "", "date": date, "authors": []} for c in reversed(commits)]


def _branch(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    repo = _repo(hub, match["repo"])
    start = repo.find(json.loads(body)["startingPoint"])
    assert start is not None
    repo.branches[match["rev"]] = [start]
    return {}


def _preupload(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    held = _commit_at(hub, match).files

    def describe(name: str) -> dict[str, Any]:
        is_lfs = name.endswith(_LFS_SUFFIXES)
        entry = held[name].entry(name) if name in held else {}
        oid = entry.get("lfs", entry).get("oid")
        return {"path": name, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}

    return {"files": [describe(file["path"]) for file in json.loads(body)["files"]]}


def _lfs_batch(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    _repo(hub, match["repo"])
    return {"transfer": "basic", "objects": [_lfs_actions(hub, **wish) for wish in json.loads(body)["objects"]]}


def _lfs_actions(hub: Hub, oid: str, size: int) -> dict[str, Any]:
    if oid in hub.objects:
        return {"oid": oid, "size": size}
    storage = f"{hub.url}/storage/{oid}"
    upload: dict[str, Any] = {"href": f"{storage}/1"}
    if size > CHUNK_NBYTES:
        parts = {f"{n + 1:05}": f"{storage}/{n + 1}" for n in range(-(-size // CHUNK_NBYTES))}
        upload = {"href": f"{hub.url}/complete/{oid}", "header": {"chunk_size": str(CHUNK_NBYTES), **parts}}
    verify = {"href": f"{hub.url}/verify/{oid}"}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def _store(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    hub.parts.setdefault(match["oid"], {})[int(match["part"])] = body
    hub.sent.append(match["oid"])
    headers["ETag"] = hashlib.md5(body).hexdigest()
    return {}


def _complete(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
    if numbers != sorted(hub.parts[match["oid"]]):
        raise _Refusal(400, "", "parts are missing")
    return {}


def _verify(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    data = b"".join(part for _, part in sorted(hub.parts.pop(match["oid"]).items()))
    if hashlib.sha256(data).hexdigest() != match["oid"]:
        raise _Refusal(400, "", "the bytes are not those of this SHA-256")
    hub.objects[match["oid"]] = data
    return {}


def _commit(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    repo, head = _repo(hub, match["repo"]), _commit_at(hub, match)
    header, *operations = [json.loads(line) for line in body.splitlines()]
    if header["value"].get("parentCommit", head.oid) != head.oid:
        raise _Refusal(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        if kind == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            if value["oid"] not in hub.objects:
                raise _Refusal(400, "", f"{value['path']}: its LFS object is missing")
            files[value["path"]] = Blob(hub.objects[value["oid"]], True)
        elif kind == "deletedFile":
            del files[value["path"]]
    commit = hub.add_commit(repo, match["rev"], header["value"]["summary"], files)
    return {"commitUrl": f"{hub.url}/{match['repo']}/commit/{commit.oid}", "commitOid": commit.oid}


def _validate_yaml(hub: Hub, match: re.Match[str], query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
    content = json.loads(body)["content"]
    metadata = yaml.safe_load(content.split("---\n")[1])
    texts = ("license", "library_name", "pipeline_tag", "base_model_relation")
    wrong = [key for key in texts if not isinstance(metadata.get(key, ""), str)]
    if wrong:
        raise _Refusal(400, "", f"{wrong} must be a string")
    return {"errors": [], "warnings": []}


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_OID = r"(?P<oid>[0-9a-f]{64})"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", _create_repo),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("GET", _MODEL, _info),
    ("GET", f"{_MODEL}/revision/(?P<rev>.+)", _info),
    ("GET", f"{_MODEL}/auth-check(?:/write)?", _auth_check),
    ("GET", f"{_MODEL}/tree/(?P<rev>.+)", _tree),
    ("GET", f"{_MODEL}/commits/(?P<rev>.+)", _history),
    ("GET", "/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _file),
    ("POST", f"{_MODEL}/branch/(?P<rev>.+)", _branch),
    ("POST", f"{_MODEL}/preupload/(?P<rev>.+)", _preupload),
    ("POST", f"{_MODEL}/commit/(?P<rev>.+)", _commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", rf"/storage/{_OID}/(?P<part>\d+)", _store),
    ("POST", f"/complete/{_OID}", _complete),
    ("POST", f"/verify/{_OID}", _verify),
]
