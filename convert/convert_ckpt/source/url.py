"""A folder of whatever fsspec opens (s3, gs, az, memory, ...) as a store."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from convert_ckpt.source.store import RemoteFile, Retry
from run_ckpt.contract.errors import FetchError, TransientError, UsageError, first_line

# What file systems call the thing that changes with a file's content, the surest first.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec that opens ``url``, and the path there. Raises UsageError."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = f'"convert-ckpt[{_EXTRAS[scheme]}]"' if scheme in _EXTRAS else "the package that the message names"
        raise UsageError(f"{scheme}://: {error}. Install it with pip install {package}.") from error
    except Exception as error:  # each file system has errors of its own
        raise UsageError(
            f"{scheme}://: {first_line(error)}. Give a folder, owner/name of the Hub, s3://, gs:// or az://."
        ) from error
    return filesystem, path.rstrip("/")


def open_url(url: str, retry: Retry) -> "UrlStore":
    """Return the folder (or file) at ``url`` as it is now. Raises UsageError or FetchError."""
    filesystem, path = open_filesystem(url)

    def list_files() -> tuple[dict[str, RemoteFile], bool]:
        with _plain_errors(url):
            return _list_files(filesystem, path)

    files, is_file = retry(list_files)
    folder, _, name = path.rpartition("/")
    if is_file:
        return UrlStore(filesystem, folder, path, name, files, root=name)
    return UrlStore(filesystem, path, path, name or url.partition("://")[0], files)


@dataclass(frozen=True)
class UrlStore:
    """The files below ``folder`` of a file system: those that ``listed`` gives, that folder or one file in it."""

    filesystem: Any
    folder: str
    listed: str
    name: str
    files: Mapping[str, RemoteFile]
    root: str = ""
    revision: None = None
    cache: None = None

    def read(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file. Raises TransientError or FetchError."""
        with _plain_errors(path):
            yield self.filesystem.cat_file(f"{self.folder}/{path}", start=start, end=stop)

    def check_unchanged(self, path: str) -> None:
        """Raise FetchError if the file is no longer the one that was listed."""
        with _plain_errors(path):
            now, _ = _list_files(self.filesystem, self.listed)
        if now.get(path) != self.files[path]:
            raise FetchError(f"{path}: changed since the run began. Start again with --restart.")


def _list_files(filesystem: Any, path: str) -> tuple[dict[str, RemoteFile], bool]:
    """Return the files of a folder and of the folders in it by relative name; or one file, and True."""
    filesystem.invalidate_cache()
    info = filesystem.info(path)
    if info["type"] == "file":
        return {path.rpartition("/")[2]: _remote_file(info)}, True
    found = filesystem.find(path, maxdepth=2, detail=True)
    names = {key: key.removeprefix(path).lstrip("/") for key in found}
    return {names[key]: _remote_file(entry) for key, entry in found.items() if names[key]}, False


def _remote_file(info: Mapping[str, Any]) -> RemoteFile:
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return RemoteFile(info["size"] or 0, version.strip('"'))


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turn what a file system raises into FetchError and TransientError."""
    try:
        yield
    except FileNotFoundError as error:
        # fsspec's http says so of a host that does not answer, too.
        answer = f", or no answer ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise FetchError(f"{what}: not there{answer}. Check the name.") from error
    except PermissionError as error:
        raise FetchError(f"{what}: no permission to read it. Check the store's credentials.") from error
    except (NotImplementedError, ValueError, TypeError) as error:
        raise FetchError(f"{what}: can't be read ({type(error).__name__}: {first_line(error)}).") from error
    except Exception as error:  # each file system has errors of its own, most without a common base
        if "Credential" in type(error).__name__:  # botocore's, google.auth's, azure's
            raise FetchError(f"{what}: {platform.node()} has no credentials for it ({first_line(error)}).") from error
        raise TransientError(f"{what}: can't be read ({type(error).__name__}: {first_line(error)}).") from error
