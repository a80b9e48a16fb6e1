"""A repo of the Hugging Face Hub as a store: one commit of it, read by range requests or into its cache."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert_ckpt.source.reference import HubRef
from convert_ckpt.source.store import GIT_BLOB, SHA256, Patience, RemoteFile, first_line
from run_ckpt.contract.errors import FetchError, TransientError
from run_ckpt.version import VERSION

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (?P<start>\d+)-\d+/(?P<total>\d+)")


def open_repo(
    reference: HubRef, patience: Patience, pinned_revision: str | None, log: Callable[[str], None]
) -> "HubRepo":
    """Return the repo at the commit that ``reference`` names now, or at ``pinned_revision``.

    Raises FetchError where there is no such repo, revision or folder, or no permission.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="convert-ckpt", library_version=VERSION)
    if pinned_revision:
        now = _model_info(api, reference.repo_id, reference.revision, patience, files=False).sha
        info = _pinned_info(api, reference, patience, pinned_revision, now)
        if now != pinned_revision:
            log(f"{reference} has moved to {now}; this run goes on with {pinned_revision}, as it began.")
    else:
        info = _model_info(api, reference.repo_id, reference.revision, patience, files=True)
    files = {sibling.rfilename: _remote_file(sibling) for sibling in info.siblings or ()}
    root = reference.folder
    if not any(name == root or name.startswith(f"{root}/" if root else "") for name in files):
        raise FetchError(f"{reference}: no {root or 'file'} in this repo. Check the name on its page.")
    assert info.sha is not None
    return HubRepo(api, reference.repo_id, f"{reference.repo_id}/{root}".rstrip("/"), info.sha, files, root)


@dataclass(frozen=True)
class HubRepo:
    """A model repo at commit ``revision``; ``root`` is the folder or file of it that is meant."""

    api: "HfApi"
    repo_id: str
    name: str
    revision: str
    files: Mapping[str, RemoteFile]
    root: str

    def read(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file. Raises TransientError or FetchError."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo_id, path, revision=self.revision, endpoint=self.api.endpoint)
        headers = build_hf_headers(
            library_name="convert-ckpt",
            library_version=VERSION,
            headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
        )
        with (
            _plain_errors(self.api, self.repo_id, self.revision, path),
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

    @property
    def cache_folder(self) -> Path:
        """Where the Hub's own cache lies."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def cached(self, path: str) -> Path | None:
        """Return where the Hub's own cache holds the file already."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo_id, path, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def cache(self, path: str) -> Path:
        """Fetch the file into the Hub's own cache. Raises TransientError or FetchError."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        with _plain_errors(self.api, self.repo_id, self.revision, path):
            return Path(self.api.hf_hub_download(self.repo_id, path, revision=self.revision))

    def _check_range(self, response: Any, path: str, start: int) -> None:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or not match or int(match["start"]) != start:
            if response.status_code == 200 and start == 0:
                return
            raise FetchError(f"{path}: {self.api.endpoint} does not answer range requests, so it can't be streamed.")
        if int(match["total"]) != self.files[path].nbytes:
            raise FetchError(
                f"{path}: {int(match['total']):,} bytes, but the repo lists {self.files[path].nbytes:,}:"
                " damaged on the Hub. Tell the owner."
            )


def _model_info(api: "HfApi", repo_id: str, revision: str | None, patience: Patience, *, files: bool) -> "ModelInfo":
    from huggingface_hub import constants

    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    while True:
        try:
            with _plain_errors(api, repo_id, revision):
                return api.model_info(repo_id, revision=revision, files_metadata=files, timeout=timeout)
        except TransientError as error:
            patience.wait(error)


def _pinned_info(
    api: "HfApi", reference: HubRef, patience: Patience, pinned_revision: str, now: str | None
) -> "ModelInfo":
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return _model_info(api, reference.repo_id, pinned_revision, patience, files=True)
    except FetchError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise FetchError(
                f"{reference} has moved to {now}, and {pinned_revision}, with which this run began, is gone."
                " Start again with --restart."
            ) from error
        raise


def _remote_file(sibling: "RepoSibling") -> RemoteFile:
    checksum = None
    if sibling.lfs:
        checksum = SHA256, sibling.lfs.sha256
    elif sibling.blob_id:
        checksum = GIT_BLOB, sibling.blob_id
    return RemoteFile(sibling.size or 0, checksum[1] if checksum else "", checksum)


@contextmanager
def _plain_errors(api: "HfApi", repo_id: str, revision: str | None, path: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into FetchError and TransientError."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    what = f"{repo_id}{f': {path}' if path else ''}"
    try:
        yield
    except HfHubHTTPError as error:
        raise _status_error(error, api, repo_id, revision, path) from error
    except LocalEntryNotFoundError as error:  # hf_hub_download: could not ask for the file; the cause says why
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _status_error(cause, api, repo_id, revision, path) from error
        raise TransientError(f"{what}: no full answer from {api.endpoint} ({first_line(cause or error)}).") from error
    except OfflineModeIsEnabled as error:
        raise FetchError(f"{what}: HF_HUB_OFFLINE is set. Unset it, or give a local folder.") from error
    except HFValidationError as error:
        raise FetchError(f"{repo_id}: not a repo name ({first_line(error)}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(f"{what}: {api.endpoint} does not answer as the Hub does. Is a proxy in between?") from error
    except HTTPError as error:
        raise TransientError(f"{what}: no full answer from {api.endpoint} ({first_line(error)}).") from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the network's
            raise
        raise TransientError(f"{what}: {first_line(error)}") from error


def _status_error(error: Any, api: "HfApi", repo_id: str, revision: str | None, path: str | None) -> FetchError:
    from huggingface_hub import errors

    status = error.response.status_code
    what = f"{repo_id}{f': {path}' if path else ''}"
    login = "Log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.GatedRepoError):
        return FetchError(f"{repo_id}: gated. Accept its terms on {api.endpoint}/{repo_id}. {login}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return FetchError(f"{repo_id}: has no revision {revision or 'main'}. Name a branch, a tag or a commit.")
    if isinstance(error, errors.EntryNotFoundError):
        return FetchError(f"{what}: listed in the repo, but not there (404). Tell the owner.")
    if isinstance(error, errors.DisabledRepoError):
        return FetchError(f"{repo_id}: the Hub has disabled this repo.")
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and path is None):
        return FetchError(f"{repo_id}: no such path here, and no such repo on the Hub, or a private one. {login}.")
    if status == 401:
        return FetchError(f"{what}: the Hub does not accept your token (401). {login} with a valid one.")
    if status == 403:
        return FetchError(f"{what}: your token may not read it (403). {login} with one that may.")
    if status == 416:
        return FetchError(f"{what}: shorter on the Hub than the repo lists (416). Tell the owner.")
    if status in _TRANSIENT_STATUS:
        reason = "too many requests" if status == 429 else "not in order"
        return TransientError(f"{what}: {api.endpoint} says {reason} ({status}).", _wait_seconds(error.response))
    return FetchError(f"{what}: {api.endpoint} answered {status}. {first_line(error)}")


def _wait_seconds(response: Any) -> float | None:
    from huggingface_hub.utils import parse_ratelimit_headers

    if response.headers.get("Retry-After", "").isdigit():
        return float(response.headers["Retry-After"])
    limit = parse_ratelimit_headers(response.headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None
