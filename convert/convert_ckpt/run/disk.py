"""How much disk a run needs, in which folder, and whether it is there."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.partial_output import Staging
from convert_ckpt.run.schedule import largest_at_once, list_fetches, list_slabs
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.errors import FaultsError
from run_ckpt.storage.units import format_nbytes

# Index, manifest and records: 300,000 tensors had 37 MB, up to 240 MB and less than that.
_TENSOR_NBYTES = 2048
_SPARE_NBYTES = 2**20


def check_disk(opened: OpenedSource, plans: Sequence[ComponentPlan], staging: Staging, *, fetches: bool = True) -> None:
    """Raise FaultsError with every disk that can't hold what is still to come.

    fetches: this machine fetches the shards of a remote source, if it is one.
    """
    faults = _disk_faults(opened, plans, staging, fetches=fetches)
    if faults:
        raise FaultsError("nothing was written", faults)


def source_nbytes_here(opened: OpenedSource, plans: Sequence[ComponentPlan]) -> int:
    """Return how much of a remote source lies in OUTPUT.partial at once, at most."""
    if opened.store is None or opened.keep_source:
        return 0
    return max(
        largest_at_once(list_fetches(list_slabs(planned.plan, ())), _shard_nbytes(opened, planned)) for planned in plans
    )


def _disk_faults(opened: OpenedSource, plans: Sequence[ComponentPlan], staging: Staging, *, fetches: bool) -> list[str]:
    needed = {staging.folder: sum(map(_output_nbytes, plans)) - _nbytes_of(staging.result)}
    if opened.store and fetches:
        needed[staging.fetched] = source_nbytes_here(opened, plans) - _nbytes_of(staging.fetched)
    if opened.store and fetches and opened.store.cache and opened.keep_source:
        needed[opened.store.cache.folder] = _uncached_nbytes(opened, plans)
    on_disk: dict[int, list[tuple[Path, int]]] = {}
    for folder, nbytes in needed.items():
        parent = next(folder for folder in (folder, *folder.parents) if folder.exists())
        on_disk.setdefault(parent.stat().st_dev, []).append((parent, nbytes))
    faults = []
    for shares in on_disk.values():
        nbytes, free = sum(share for _, share in shares), shutil.disk_usage(shares[0][0]).free
        if nbytes > free:
            where = " and ".join(str(folder) for folder, _ in shares)
            sizes = f"{format_nbytes(nbytes)} needed, {format_nbytes(free)} free"
            faults.append(f"{where}: {sizes}. Make room or choose another disk.")
    return faults


def _output_nbytes(planned: ComponentPlan) -> int:
    side_files = sum(path.stat().st_size for path in planned.source.side_files)
    return planned.plan.output_nbytes + side_files + _TENSOR_NBYTES * len(planned.plan.tensors) + _SPARE_NBYTES


def _shard_nbytes(opened: OpenedSource, planned: ComponentPlan) -> dict[str, int]:
    """Return shard -> what it takes to fetch it: nothing where the store's cache holds it."""
    return {
        shard.name: 0 if opened.is_cached(planned.name, shard.name) else shard.header.file_nbytes
        for shard in planned.source.folder.shards
    }


def _uncached_nbytes(opened: OpenedSource, plans: Sequence[ComponentPlan]) -> int:
    return sum(sum(_shard_nbytes(opened, planned).values()) for planned in plans)


def _nbytes_of(folder: Path) -> int:
    nbytes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed by a run on another part
            nbytes += path.stat().st_size if path.is_file() else 0
    return nbytes
