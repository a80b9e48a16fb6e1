"""What SOURCE names: a path here, a Hub repo at a revision, or a folder of another store."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from run_ckpt.contract.errors import FetchError, UsageError
from run_ckpt.storage.files import similar_path
from run_ckpt.storage.hub_client import page_of_hub

_HUB_SCHEME = "hf://"
_REPO = r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
# Of the revisions with a slash, those of pull requests and conversions may be written as they are; else it is %2F.
_REVISION = r"(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?"
_HUB_NAME = re.compile(_REPO + _REVISION)
_HUB_URL = re.compile(r"(models/)?" + _REPO + _REVISION + r"(/(?P<folder>.*))?")
# What follows the address of the Hub in a browser.
_HUB_PAGE = re.compile(
    _REPO + r"(/(tree|blob|resolve)/(?P<revision>refs/(pr|convert)/[^/]+|[^/]+)(/(?P<folder>[^?]*))?)?/?([?#].*)?"
)


@dataclass(frozen=True)
class HubRef:
    """A model repo of the Hub, or the ``folder`` (or file) in it. ``revision`` is None for the default branch.

    ``may_be_path``: as it was written, it may be the name of a folder here that does not exist.
    """

    repo_id: str
    revision: str | None
    folder: str
    may_be_path: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_HUB_SCHEME}{self.repo_id}{revision}{'/' + self.folder if self.folder else ''}"

    def as_path_error(self, error: FetchError) -> FetchError:
        """Return what to say where the Hub has no such repo, or can't be asked: it may have been meant as a path."""
        from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

        if not self.may_be_path or isinstance(error.__cause__, GatedRepoError | RevisionNotFoundError):
            return error
        what = str(error).removeprefix(f"{self.repo_id}: ")
        return FetchError(f"{self.repo_id}: no such path here{similar_path(Path(self.repo_id))}, and {what}")


@dataclass(frozen=True)
class UrlRef:
    """A folder (or file) that fsspec opens: s3://, gs://, az://, memory://, ..."""

    url: str

    def __str__(self) -> str:
        """Without a password or signature, so that it may be written and shown."""
        return re.sub(r"//[^/@]*@", "//", self.url).partition("?")[0]


Reference = Path | HubRef | UrlRef


def parse_reference(source: str | Path) -> Reference:
    """Return what SOURCE names; a path that exists here wins over a repo ``owner/name``.

    The address of a repo's page on the Hub, or of a folder or file there, names it too.
    Raises UsageError for a malformed hf:// URL.
    """
    if source == "":
        raise UsageError("SOURCE is empty. Give a folder, a file, owner/name or a URL; . is the current folder.")
    if isinstance(source, Path) or Path(source).exists():
        return Path(source)
    if source.startswith(_HUB_SCHEME):
        return _hub_ref(source, _HUB_URL, source.removeprefix(_HUB_SCHEME))
    if source.startswith(("http://", "https://")) and (page := page_of_hub(source)) is not None:
        return _hub_ref(source, _HUB_PAGE, page)
    if source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))
    if "://" in source:
        return UrlRef(source.rstrip("/"))
    if _HUB_NAME.fullmatch(source):
        return replace(_hub_ref(source, _HUB_URL, source), may_be_path=True)
    return Path(source)


def _hub_ref(source: str, pattern: re.Pattern[str], text: str) -> HubRef:
    match = pattern.fullmatch(text)
    if not match or match["repo_id"].startswith(("datasets/", "spaces/")):
        raise UsageError(f"{source}: names no model of the Hub. Say hf://owner/name[@revision][/folder].")
    revision, folder = match["revision"], match["folder"] or ""
    return HubRef(match["repo_id"], unquote(revision) if revision else None, unquote(folder).strip("/"))
