"""A stand-in for the Hugging Face Hub: a server on loopback that speaks the part of its API that reading uses.

Written for the tests from huggingface_hub 2.4's own calls: model info with file metadata, and resolve (HEAD
and GET, ranges, a redirect of LFS files to a second host that stands for the CDN). It can cut
answers short, refuse, lie, and move a branch. It proves nothing about the real Hub.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in_token"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>.+)")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")

Files = dict[str, bytes]


@dataclass
class Request:
    """One request that came: what was asked, where, and whether a token came with it."""

    method: str
    host: str
    path: str
    range: str | None
    has_token: bool


@dataclass
class Fault:
    """What goes wrong with requests whose path matches ``pattern``, ``times`` of them."""

    pattern: str
    times: int = 1_000_000
    status: int | None = None
    body: bytes = b'{"error": "a fault of the stand-in"}'
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: Callable[[], int] | None = None  # how many bytes of the body are sent
    edit: Callable[[bytes], bytes] | None = None


@dataclass
class Repo:
    """Commits by hash, branches by name; ``access`` is "public", "gated" or "private"."""

    commits: dict[str, Files]
    branches: dict[str, str]
    access: str = "public"


class HubServer:
    """The stand-in's state. ``endpoint`` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lies: dict[str, dict[str, object]] = {}  # path in a repo -> what the listing says of it instead
        self.ignores_ranges = False
        self.on_request: Callable[[str], None] = lambda _: None
        self.sent: Counter[str] = Counter()  # file name -> bytes of it that the CDN sent
        self.lock = threading.Lock()
        self.endpoint = self.cdn = ""
        self.servers: list[ThreadingHTTPServer] = []

    def add_repo(self, repo_id: str, files: Files, access: str = "public") -> str:
        """Add a repo with one commit on main and return the commit."""
        self.repos[repo_id] = Repo({}, {}, access)
        return self.commit(repo_id, files)

    def commit(self, repo_id: str, files: Files, branch: str = "main") -> str:
        """Move a branch to a new commit that holds ``files``, and return it."""
        commit = hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
        self.repos[repo_id].commits[commit] = files
        self.repos[repo_id].branches[branch] = commit
        return commit

    def forget(self) -> None:
        """Start the accounts anew."""
        self.requests.clear()
        self.sent.clear()

    def stop(self) -> None:
        """Close both hosts, so that nobody answers there."""
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers = []

    def take_fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Yield a running stand-in."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [_QuietServer((host, 0), handler) for host in ("127.0.0.1", "127.0.0.2")]  # both on loopback
    hub.endpoint, hub.cdn = (f"http://{server.server_address[0]}:{server.server_port}" for server in servers)
    hub.servers = servers
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield hub
    hub.stop()


def read_files(folder: Path) -> Files:
    """Return a folder's files as the content of a commit."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@lru_cache(maxsize=256)
def describe(path: str, data: bytes) -> dict[str, Any]:
    """Return a file as model info lists it."""
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_oid(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(
                Request(self.command, self.headers["Host"], path, self.headers.get("Range"), token is not None)
            )
        self.hub.on_request(path)
        fault = self.hub.take_fault(path)
        if fault and fault.status:
            self._send(fault.status, fault.body, fault.headers)
        elif path.startswith("/cdn/"):
            self._send_cdn(path, fault)
        elif match := _TREE.fullmatch(path):
            self._send_tree(match, token)
        elif match := _INFO.fullmatch(path):
            self._send_info(match, token)
        elif match := _RESOLVE.fullmatch(path):
            self._send_file(match, token, fault)
        else:
            self._send(404, b"{}")

    def _find(self, match: re.Match[str], token: str | None) -> tuple[str, Files] | None:
        """Return the commit and its files, or answer with what stands in the way."""
        repo = self.hub.repos.get(match["repo"])
        if repo is None or (repo.access == "private" and token != f"Bearer {TOKEN}"):
            self._send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return None
        revision = match["revision"] or "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return None
        if repo.access == "gated" and "path" in match.groupdict() and token != f"Bearer {TOKEN}":
            self._send(401, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
            return None
        return commit, repo.commits[commit]

    def _send_info(self, match: re.Match[str], token: str | None) -> None:
        found = self._find(match, token)
        if found:
            commit, files = found
            siblings = [{**describe(path, files[path]), **self.hub.lies.get(path, {})} for path in sorted(files)]
            info = {"id": match["repo"], "sha": commit, "siblings": siblings, "tags": [], "private": False}
            self._send(200, json.dumps(info).encode())

    def _send_tree(self, match: re.Match[str], token: str | None) -> None:
        found = self._find(match, token)
        if found:
            entries = []
            for path, data in sorted(found[1].items()):
                entry = describe(path, data)
                lfs = {"lfs": {"oid": entry["lfs"]["sha256"], **entry["lfs"]}} if "lfs" in entry else {}
                entries.append({"type": "file", "path": path, "oid": entry["blobId"], "size": len(data), **lfs})
            self._send(200, json.dumps(entries).encode())

    def _send_file(self, match: re.Match[str], token: str | None, fault: Fault | None) -> None:
        found = self._find(match, token)
        if not found:
            return
        commit, files = found
        path = match["path"]
        if path not in files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        entry = describe(path, files[path])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["blobId"]}"'}
        if "lfs" in entry:
            sha256 = entry["lfs"]["sha256"]
            location = f"{self.hub.cdn}/cdn/{match['repo']}/{commit}/{path}"
            headers |= {"X-Linked-Size": str(len(files[path])), "X-Linked-Etag": f'"{sha256}"', "Location": location}
            self._send(302, b"", headers)
        else:
            self._send_range(files[path], headers, fault)

    def _send_cdn(self, path: str, fault: Fault | None) -> None:
        owner, name, commit, path = path.removeprefix("/cdn/").split("/", 3)
        self._send_range(self.hub.repos[f"{owner}/{name}"].commits[commit][path], {}, fault)

    def _send_range(self, data: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        if fault and fault.edit:
            data = fault.edit(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or self.hub.ignores_ranges:
            self._send(200, data, headers, fault)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
        if start >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._send(206, data[start:stop], headers | content_range, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        cut = min(fault.cut_after(), len(body)) if fault and fault.cut_after else len(body)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            if "/cdn/" in self.path:
                self.hub.sent[self.path.rpartition("/")[2]] += cut
        if cut < len(body):
            self.close_connection = True
