"""A repo of the Hugging Face Hub as a store: one commit of it, read by range requests or into its cache."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert_ckpt.source.store import GIT_BLOB, SHA256, RemoteFile, Retry
from run_ckpt.contract.errors import FetchError, TransientError
from run_ckpt.storage.hub_client import CLIENT, hub_errors, make_client
from run_ckpt.storage.reference import HubRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

# No file system has a file of more.
_LARGEST_NBYTES = 2**43
_CONTENT_RANGE = re.compile(r"bytes (?P<start>\d+)-\d+/(?P<total>\d+)")


def open_repo(reference: HubRef, retry: Retry, pinned_revision: str | None, log: Callable[[str], None]) -> "HubRepo":
    """Return the repo at the commit that ``reference`` names now, or at ``pinned_revision``.

    Raises FetchError where there is no such repo, revision or folder, or no permission.
    """
    client = make_client()
    info = _find_repo(client, reference, retry)
    if pinned_revision and pinned_revision != info.sha:
        log(f"{reference} has moved to {info.sha}; this run goes on with {pinned_revision}, as it began.")
        info = _pinned_info(client, reference, retry, pinned_revision, info.sha)
    files = {sibling.rfilename: _remote_file(sibling) for sibling in info.siblings or ()}
    root = reference.folder
    if not any(name == root or name.startswith(f"{root}/" if root else "") for name in files):
        raise FetchError(f"{reference}: no {root or 'file'} in this repo. Check the name on its page.")
    assert info.sha is not None
    return HubRepo(client, reference.repo_id, f"{reference.repo_id}/{root}".rstrip("/"), info.sha, files, root)


@dataclass(frozen=True)
class HubCache:
    """The Hub's own cache of a commit's files."""

    client: "HfApi"
    repo_id: str
    revision: str

    @property
    def folder(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def find(self, path: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, path, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, path: str) -> Path:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        with hub_errors(self.repo_id, path):
            return Path(self.client.hf_hub_download(self.repo_id, path, revision=self.revision))


@dataclass(frozen=True)
class HubRepo:
    """A model repo at commit ``revision``; ``root`` is the folder or file of it that is meant.

    Shards are not left to hf_hub_download (huggingface_hub 2.4): it starts a file anew after a kill, ends at a 503,
    asks for up to 10 MB twice after a cut, and compares no checksum.
    """

    client: "HfApi"
    repo_id: str
    name: str
    revision: str
    files: Mapping[str, RemoteFile]
    root: str

    @property
    def cache(self) -> HubCache:
        return HubCache(self.client, self.repo_id, self.revision)

    def read(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file. Raises TransientError or FetchError."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo_id, path, revision=self.revision, endpoint=self.client.endpoint)
        ranges = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(headers=ranges, **CLIENT)
        with (
            hub_errors(self.repo_id, path),
            get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
        ):
            hf_raise_for_status(response)
            self._check_range(response, path, start)
            left = stop - start
            for part in response.iter_bytes():
                yield part[:left]
                left -= len(part)
                if left <= 0:
                    return

    def check_unchanged(self, path: str) -> None:
        """A commit does not change."""

    def _check_range(self, response: Any, path: str, start: int) -> None:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or not match or int(match["start"]) != start:
            if response.status_code == 200 and start == 0:
                return
            raise FetchError(f"{path}: {self.client.endpoint} does not answer range requests, so it can't be streamed.")
        if int(match["total"]) != self.files[path].nbytes:
            raise FetchError(
                f"{path}: {int(match['total']):,} bytes, but the repo lists {self.files[path].nbytes:,}:"
                " damaged on the Hub. Tell the owner."
            )


def _find_repo(client: "HfApi", reference: HubRef, retry: Retry) -> "ModelInfo":
    repo_id = reference.repo_id

    def ask() -> "ModelInfo":
        try:
            return _ask(client, repo_id, reference.revision)
        except TransientError as error:
            if reference.may_be_path and not error.is_answer:  # rather a path that is misspelt than one to wait for
                raise FetchError(str(error)) from error
            raise

    try:
        return retry(ask)
    except FetchError as error:
        raise reference.as_path_error(error) from error


def _pinned_info(
    client: "HfApi", reference: HubRef, retry: Retry, pinned_revision: str, now: str | None
) -> "ModelInfo":
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return retry(lambda: _ask(client, reference.repo_id, pinned_revision))
    except FetchError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise FetchError(
                f"{reference} has moved to {now}, and {pinned_revision}, with which this run began, is gone."
                " Start again with --restart."
            ) from error
        raise


def _ask(client: "HfApi", repo_id: str, revision: str | None) -> "ModelInfo":
    from huggingface_hub import constants

    with hub_errors(repo_id, revision=revision):
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = client.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
        if not isinstance(info.sha, str):
            raise ValueError("no commit")
        return info


def _remote_file(sibling: "RepoSibling") -> RemoteFile:
    """Return what the listing says of a file, whose types the Hub's client does not check. Raises FetchError."""
    kind, digest = (SHA256, sibling.lfs.sha256) if sibling.lfs else (GIT_BLOB, sibling.blob_id or "")
    nbytes: object = sibling.size or 0
    if not (isinstance(nbytes, int) and 0 <= nbytes <= _LARGEST_NBYTES and isinstance(digest, str)):
        raise FetchError(
            f"{sibling.rfilename}: listed with {nbytes!r} bytes and the checksum {digest!r}, which the Hub does not do."
            " Is a proxy in between?"
        )
    return RemoteFile(nbytes, digest, (kind, digest) if digest else None)
