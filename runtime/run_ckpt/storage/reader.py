"""The bytes of tensors, from their files: read, or mapped."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.shards import TensorFolder

if TYPE_CHECKING:  # convert-ckpt reads its source without torch
    from torch import Tensor

COPY_NBYTES = 8 * 2**20


def read_fully(fd: int, view: memoryview, offset: int, name: str) -> None:
    """Fill ``view`` (bytes) from byte ``offset`` of the open file ``name``. Raises CheckpointError if the file ends."""
    while view:
        n_read = os.preadv(fd, [view], offset)
        if n_read == 0:
            raise CheckpointError(f"{name}: ended at byte {offset} while it was read. Fetch it again.")
        view, offset = view[n_read:], offset + n_read


def cut_bytes(nbytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of the slabs of a tensor that is only copied or compared, cut at ``multiple`` bytes."""
    step = max(1, COPY_NBYTES // multiple) * multiple
    for start in range(0, nbytes, step):
        yield start, min(step, nbytes - start)


class TensorReader:
    """The bytes of the tensors of ``folder``: read() into memory of our own, from any thread, or mapped.

    A context manager: files are open from its start to its end.
    """

    def __init__(self, folder: TensorFolder):
        self._folder = folder
        self._places = {tensor.spec.name: (shard, tensor) for shard, tensor in folder.tensors()}
        self._fds: dict[str, int] = {}
        self._mapped: dict[str, Tensor] = {}

    def spec(self, name: str) -> TensorSpec | None:
        """Return the spec of a stored tensor, None where there is none of that name."""
        return self._places[name][1].spec if name in self._places else None

    def stored_spec(self, name: str) -> TensorSpec:
        """Return the spec of a tensor that is stored."""
        return self._places[name][1].spec

    def shard_name(self, name: str) -> str:
        return self._places[name][0].name

    def read(self, name: str, start: int, nbytes: int) -> Tensor:
        """Return uint8 [nbytes]: bytes ``start``.. of tensor ``name``. Raises CheckpointError if the file ends."""
        import torch

        data = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(name, start, data)
        return data

    def read_into(self, name: str, start: int, data: Tensor) -> None:
        """Fill ``data``, uint8 [nbytes] on the CPU, with bytes ``start``.. of tensor ``name``; raises as read."""
        shard, stored = self._places[name]
        read_fully(self._fds[shard.name], data.numpy().data, stored.offset + start, shard.name)

    def mapped(self, name: str) -> Tensor:
        """Return uint8 [nbytes]: the whole tensor, mapped from its file and read when it is used, as safetensors does.

        It outlives this reader. Overwriting the file in place would change it; replacing the file does not.
        """
        import torch

        shard, stored = self._places[name]
        if shard.name not in self._mapped:
            access = mmap.PROT_READ | mmap.PROT_WRITE  # of pages that are our own as soon as they are written
            mapped = mmap.mmap(self._fds[shard.name], shard.header.file_nbytes, flags=mmap.MAP_PRIVATE, prot=access)
            self._mapped[shard.name] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._mapped[shard.name][stored.offset : stored.end]

    def read_all(self, name: str) -> Tensor:
        """Return uint8 [nbytes]: the whole tensor. For scales of FP8 and other small ones."""
        return self.read(name, 0, self._places[name][1].spec.nbytes)

    def __enter__(self) -> TensorReader:
        self._fds = {shard.name: open_to_read(shard.path) for shard in self._folder.shards}
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._mapped.clear()
