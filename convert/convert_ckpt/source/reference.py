"""What SOURCE names: a path here, a Hub repo at a revision, or a folder of another store."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from run_ckpt.contract.errors import UsageError

_HUB_SCHEME = "hf://"
_REPO = r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
# Of the revisions with a slash, those of pull requests and conversions may be written as they are; else it is %2F.
_REVISION = r"(@(?P<revision>refs/(pr|convert)/[^/@]+|[^/@]+))?"
_HUB_NAME = re.compile(_REPO + _REVISION)
_HUB_URL = re.compile(r"(models/)?" + _REPO + _REVISION + r"(/(?P<folder>.*))?")


@dataclass(frozen=True)
class HubRef:
    """A model repo of the Hub, or the ``folder`` (or file) in it. ``revision`` is None for the default branch."""

    repo_id: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_HUB_SCHEME}{self.repo_id}{revision}{'/' + self.folder if self.folder else ''}"


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

    Raises UsageError for a malformed hf:// URL.
    """
    if isinstance(source, Path) or Path(source).exists():
        return Path(source)
    if source.startswith(_HUB_SCHEME):
        match = _HUB_URL.fullmatch(source.removeprefix(_HUB_SCHEME))
        if not match or source.startswith(("hf://datasets/", "hf://spaces/")):
            raise UsageError(f"{source}: names no model of the Hub. Say hf://owner/name[@revision][/folder].")
        return _hub_location(match, (match["folder"] or "").strip("/"))
    if source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))
    if "://" in source:
        return UrlRef(source.rstrip("/"))
    match = _HUB_NAME.fullmatch(source)
    return _hub_location(match, "") if match else Path(source)


def _hub_location(match: re.Match[str], folder: str) -> HubRef:
    revision = match["revision"]
    return HubRef(match["repo_id"], unquote(revision) if revision else None, folder)
