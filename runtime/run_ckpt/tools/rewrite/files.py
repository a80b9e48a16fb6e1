"""Where the files of a rewrite go: into a new folder; or nowhere, where a finished one has to be the same."""

import os
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any, Protocol

from run_ckpt.storage.folders import Folder
from run_ckpt.storage.hashing import describe_entry, hash_file, hash_parts
from run_ckpt.storage.header import Header
from run_ckpt.storage.reader import read_fully
from run_ckpt.storage.writer import ShardWriter


class TensorWriter(Protocol):
    """A shard that is made tensor by tensor, see ShardWriter."""

    def write(self, name: str, offset: int, data: memoryview) -> None: ...
    def finish(self) -> dict[str, Any]: ...


class Files(Protocol):
    """The files of a component, as they are made."""

    def open_shard(self, name: str, header: Header) -> TensorWriter: ...
    def write_parts(self, name: str, parts: Iterable[bytes]) -> None: ...
    def finish(self, names: Iterable[str]) -> None:
        """Take note that these are all."""


class NewFiles:
    """Files written into ``folder``."""

    def __init__(self, folder: Folder, background: Executor):
        self._folder = folder
        self._background = background

    def open_shard(self, name: str, header: Header) -> TensorWriter:
        return ShardWriter(self._folder, name, header, self._background)

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        self._folder.write_parts(name, parts)

    def finish(self, names: Iterable[str]) -> None:
        """They are there."""


class DiffersError(Exception):
    """A finished folder is not what the rewrite would write."""


class FinishedFiles:
    """Files of ``folder`` compared with what would be written, byte by byte. All raise DiffersError, or OSError."""

    def __init__(self, folder: Folder):
        self._folder = folder

    def open_shard(self, name: str, header: Header) -> TensorWriter:
        return _FinishedShard(self._folder.open_file(name), header)

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        found = describe_entry(self._folder, name)
        if found is None or found["blake3"] != hash_parts(parts):
            raise DiffersError(name)

    def finish(self, names: Iterable[str]) -> None:
        if set(self._folder.names()) != set(names):
            raise DiffersError


class _FinishedShard:
    def __init__(self, fd: int, header: Header):
        self._fd = fd
        self._nbytes = header.file_nbytes
        self._places = {stored.spec.name: stored.offset for stored in header.tensors}
        if os.fstat(fd).st_size != self._nbytes:
            raise DiffersError
        self._compare(0, header.data)

    def __del__(self) -> None:
        os.close(self._fd)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        self._compare(self._places[name] + offset, memoryview(data).cast("B"))

    def finish(self) -> dict[str, Any]:
        return {"nbytes": self._nbytes, "blake3": hash_file(self._fd)}

    def _compare(self, start: int, data: bytes | memoryview) -> None:
        found = bytearray(len(data))
        read_fully(self._fd, memoryview(found), start, "the finished file")
        if found != bytes(data):
            raise DiffersError
