"""The output shards of one component: written in any order, and finished in the background."""

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert_ckpt.plan.plan import FilePlan, Plan
from convert_ckpt.run.places import Places
from convert_ckpt.run.schedule import Slab
from convert_ckpt.run.wait import Signal
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.writer import ShardWriter

# One hashes a finished file while the other waits for the disk.
_N_THREADS = 2


@dataclass(frozen=True)
class FileRecord:
    """What is known of a finished output file: what the manifest needs, and the amax of its groups."""

    file: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    sources: dict[str, dict[str, Any]]
    group_amax: dict[str, int]


class OutputFiles:
    """What the workers write: the files of ``plan``. ``slabs`` are all that write to them.

    ``on_finished`` is called with each file that is complete and durable, and with what the manifest says of it.
    ``made`` are the bytes of output tensors that are there already; start() writes them.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        slabs: list[Slab],
        signal: Signal,
        on_finished: Callable[[FilePlan, dict[str, Any]], None],
        made: Mapping[str, np.ndarray],
    ):
        self._files = {file.name: file for file in plan.files}
        self._places = Places(plan)
        self._folder = folder
        self._signal = signal
        self._on_finished = on_finished
        self._made = made
        self._unwritten = Counter(name for slab in slabs for name in slab.outputs)
        self._writers: dict[str, ShardWriter] = {}
        self._background = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="finish")

    def start(self) -> None:
        """Write what is there already, before any worker does."""
        for name, data in self._made.items():
            self.write(name, 0, data)

    def write(self, tensor: str, offset: int, data: np.ndarray) -> None:
        """Write to byte ``offset`` of an output tensor, and over its end, wherever a file of the plan has it."""
        for place in self._places.find(tensor):
            self._writer(place.file).write(place.tensor, place.offset + offset, data.data)

    def count(self, slabs: list[Slab]) -> None:
        """Note that slabs are written; after its last one a file is finished in the background."""
        written = Counter(name for slab in slabs for name in slab.outputs)
        with self._signal.notify():
            self._unwritten.subtract(written)
            complete = [name for name in written if self._unwritten[name] == 0]
        for name in complete:
            self._background.submit(self._finish, name)

    def wait(self) -> None:
        """Wait until every file to be finished is."""
        self._background.shutdown()

    def close(self) -> None:
        """Let the files go, finished or not. No thread may be writing."""
        self._background.shutdown()
        for writer in self._writers.values():
            writer.close()

    def _finish(self, name: str) -> None:
        try:
            self._on_finished(self._files[name], self._writer(name).finish())
        except BaseException as error:
            self._signal.fail(error)

    def _writer(self, name: str) -> ShardWriter:
        if name not in self._writers:
            with self._signal.notify():
                if name not in self._writers:
                    self._writers[name] = ShardWriter(self._folder, name, self._files[name].header, self._background)
        return self._writers[name]
