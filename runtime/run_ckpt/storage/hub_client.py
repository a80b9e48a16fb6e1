"""The Hugging Face Hub as both commands use it: its client, its errors in plain words, git's blob ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from run_ckpt.contract.errors import FetchError, PublishError, TransientError, UsageError, first_line
from run_ckpt.version import VERSION

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

CLIENT: dict[str, Any] = {"library_name": "convert-ckpt", "library_version": VERSION}

_LOGIN = "log in with `hf auth login` (or set HF_TOKEN)"
_ANSWERS = {
    401: f"the Hub does not accept your token (401). To use a valid one, {_LOGIN}.",
    403: "your token may not {act} it (403). Use one with {act} permission, or another repo.",
    409: "it exists and you may not see it, or another change to it is going on (409).",
    412: "it was changed by someone else meanwhile (412).",
    416: "shorter on the Hub than the repo lists (416). Tell the owner.",
    429: "the Hub says too many requests (429).",
}
# What may be answered otherwise when it is asked again; all above 500 too.
_PASSING = (408, 409, 412, 425, 429)
# What the client raises where nobody is there, by name: it is httpx's in huggingface_hub 1.x and httpx2's in 2.x.
_UNREACHED = ("ConnectError", "ConnectTimeout")
_PUSH_AGAIN = "Push again later: it goes on where it stopped."


def make_client() -> HfApi:
    """Return the Hub's own client; address and token are where it looks for them."""
    from huggingface_hub import HfApi

    return HfApi(**CLIENT)


def page_of_repo(repo_id: str) -> str:
    """Return the address of a repo's page."""
    return f"{_endpoint()}/{repo_id}"


def page_of_hub(url: str) -> str | None:
    """Return what follows the Hub's address in a URL, None for a URL elsewhere."""
    from huggingface_hub import constants

    homes = {f"{constants.ENDPOINT}/", constants.HUGGINGFACE_CO_URL_HOME}
    return next((url.removeprefix(home) for home in homes if url.startswith(home)), None)


def new_git_blob_hash(nbytes: int) -> Any:
    """Return a hashlib object that gives git's id of a file of ``nbytes`` once the file has passed."""
    return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)


@contextmanager
def hub_errors(
    repo_id: str, path: str | None = None, revision: str | None = None, *, writes: bool = False
) -> Iterator[None]:
    """Turn what the Hub's client raises into one line with a remedy, without token or signed URL.

    Raises TransientError where the same request may succeed later, else FetchError; PublishError for both
    where the caller ``writes``; UsageError for a name that no repo can have.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    what = f"{repo_id}: {path}" if path else repo_id
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: not the name of a repo. Give owner/name of letters, digits, - _ and .") from error
    except OfflineModeIsEnabled as error:
        text = f"{what}: HF_HUB_OFFLINE is set. Unset it to reach the Hub."
        raise (PublishError if writes else FetchError)(text) from error
    # Some of the client's errors are OSError; a failed upload is RuntimeError, a refused README.md ValueError. An
    # answer of other JSON is any of the second line.
    except (
        *(HTTPError, OSError, RuntimeError),
        *(ValueError, KeyError, TypeError, AttributeError, AssertionError),
    ) as error:
        answer = _find_answer(error)
        if answer is None and isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the network's
        if answer:
            text, passing = _describe(answer, what, revision, writes=writes)
        elif isinstance(error, HTTPError | OSError | RuntimeError):
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            text, passing = f"{what}: no full answer from {_endpoint()} ({first_line(cause or error)}).", True
        else:
            text, passing = f"{what}: {_endpoint()} does not answer as the Hub does. Is a proxy in between?", False
        if writes:
            raise PublishError(f"{text} {_PUSH_AGAIN}" if passing else text) from error
        if passing:
            wait_seconds = _wait_seconds(answer) if answer else None
            raise TransientError(text, wait_seconds, is_answer=type(error).__name__ not in _UNREACHED) from error
        raise FetchError(text) from error


def _find_answer(error: BaseException) -> HfHubHTTPError | None:
    """Return the Hub's answer among an error and its causes."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause


def _describe(error: HfHubHTTPError, what: str, revision: str | None, *, writes: bool) -> tuple[str, bool]:
    """Return a sentence about the Hub's answer, and whether it may be another one later."""
    from huggingface_hub import errors

    status, repo_id = error.response.status_code, what.partition(":")[0]
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id}: gated. Accept its terms on {page_of_repo(repo_id)}, then {_LOGIN}.", False
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id}: has no revision {revision or 'main'}. Name a branch, a tag or a commit.", False
    if isinstance(error, errors.EntryNotFoundError):
        return f"{what}: listed in the repo, but not there (404). Tell the owner.", False
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo_id}: the Hub has disabled this repo.", False
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and what == repo_id):
        return f"{what}: no such repo on the Hub, or a private one ({status}). Check the name, or {_LOGIN}.", False
    if status in _ANSWERS:
        text = _ANSWERS[status].format(act="write" if writes else "read")
    elif status in _PASSING or status >= 500:
        text = f"{_endpoint()} is not in order ({status})."
    else:
        text = f"the Hub refuses: it answered {status}. {first_line(error.server_message or error)}"
    return f"{what}: {text}", status in _PASSING or status >= 500


def _wait_seconds(error: HfHubHTTPError) -> float | None:
    """Return how long the Hub asks to wait, None where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = error.response.headers
    if headers.get("Retry-After", "").isdigit():
        return float(headers["Retry-After"])
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
