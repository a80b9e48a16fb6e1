"""The bytes of tensors, from their files: read, or mapped."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.shards import TensorFolder
from run_ckpt.storage.views import View, whole_views

if TYPE_CHECKING:  # convert-ckpt reads its source without torch
    from torch import Tensor

COPY_NBYTES = 8 * 2**20


def read_fully(fd: int, view: memoryview, offset: int, name: str) -> None:
    """Fill ``view`` (bytes) from byte ``offset`` of the open file ``name``. Raises CheckpointError if the file ends."""
    read_parts(fd, [view], offset, name)


def read_parts(fd: int, views: list[memoryview], offset: int, name: str) -> None:
    """Fill ``views``, one after the other, as read_fully."""
    while views := [view for view in views if view]:
        n_read = os.preadv(fd, views, offset)
        if n_read == 0:
            raise CheckpointError(f"{name}: ended at byte {offset} while it was read. Fetch it again.")
        offset += n_read
        while views and n_read >= len(views[0]):
            n_read -= len(views.pop(0))
        views[:1] = [view[n_read:] for view in views[:1]]


def cut_bytes(nbytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of the slabs of a tensor that is only copied or compared, cut at ``multiple`` bytes."""
    step = max(1, COPY_NBYTES // multiple) * multiple
    for start in range(0, nbytes, step):
        yield start, min(step, nbytes - start)


class TensorReader:
    """The bytes of the tensors of ``folder``: read() into memory of our own, from any thread, or mapped.

    A context manager: files are open from its start to its end.
    """

    def __init__(self, folder: TensorFolder, views: Iterable[View] | None = None):
        """views: the tensors by the names they are read under. Default: as they are stored."""
        self._folder = folder
        self._views = {view.spec.name: view for view in (whole_views(folder) if views is None else views)}
        self._fds: dict[str, int] = {}
        self._mapped: dict[str, Tensor] = {}

    def spec(self, name: str) -> TensorSpec | None:
        """Return the spec of a stored tensor, None where there is none of that name."""
        return self._views[name].spec if name in self._views else None

    def stored_spec(self, name: str) -> TensorSpec:
        """Return the spec of a tensor that is stored."""
        return self._views[name].spec

    def view(self, name: str) -> View:
        """Return where a tensor that is stored lies."""
        return self._views[name]

    def specs(self) -> list[TensorSpec]:
        """Return the specs of all tensors."""
        return [view.spec for view in self._views.values()]

    def renamed(self, names: Mapping[str, str]) -> TensorReader:
        """Return a reader of the same open files under other names; those that ``names`` lacks stay."""
        views = [
            replace(view, spec=replace(view.spec, name=names.get(name, name))) for name, view in self._views.items()
        ]
        return self.seen_as(views)

    def seen_as(self, views: Iterable[View]) -> TensorReader:
        """Return a reader of other parts of the same open files."""
        reader = TensorReader(self._folder, views)
        reader._fds, reader._mapped = self._fds, self._mapped
        return reader

    def shard_name(self, name: str) -> str:
        return self._views[name].shard

    def read(self, name: str, start: int, nbytes: int) -> Tensor:
        """Return uint8 [nbytes]: bytes ``start``.. of tensor ``name``. Raises CheckpointError if the file ends."""
        import torch

        data = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(name, start, data)
        return data

    def read_into(self, name: str, start: int, data: Tensor) -> None:
        """Fill ``data``, uint8 [nbytes] on the CPU, with bytes ``start``.. of tensor ``name``; raises as read."""
        view = self._views[name]
        view.read(start, data.numpy(), lambda offset, out: read_fully(self._fds[view.shard], out, offset, view.shard))

    def mapped(self, name: str) -> Tensor:
        """Return uint8 [nbytes]: the whole tensor, mapped from its file and read when it is used, as safetensors does.

        It outlives this reader. Overwriting the file in place would change it; replacing the file does not.
        """
        import torch

        view = self._views[name]
        assert not view.pieces
        if view.shard not in self._mapped:
            access = mmap.PROT_READ | mmap.PROT_WRITE  # of pages that are our own as soon as they are written
            mapped = mmap.mmap(self._fds[view.shard], 0, flags=mmap.MAP_PRIVATE, prot=access)
            self._mapped[view.shard] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._mapped[view.shard][view.offset : view.offset + view.nbytes]

    def read_all(self, name: str) -> Tensor:
        """Return uint8 [nbytes]: the whole tensor. For scales of FP8 and other small ones."""
        return self.read(name, 0, self._views[name].spec.nbytes)

    def __enter__(self) -> TensorReader:
        self._fds = {shard.name: open_to_read(shard.path) for shard in self._folder.shards}
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._mapped.clear()
