"""SOURCE opened: a folder to plan from, and the store that holds the rest where it lies elsewhere."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from convert_ckpt.source.component import Component, open_component
from convert_ckpt.source.shards import FetchedShards, LocalShards, ShardProvider
from convert_ckpt.source.skeleton import fill_skeleton, make_skeleton
from convert_ckpt.source.store import SHA256, RemoteFile, Retry, Store
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.file_names import join_names, unsafe_file_name
from run_ckpt.progress import Progress
from run_ckpt.storage.components import find_components
from run_ckpt.storage.reference import HubRef, Reference, UrlRef
from run_ckpt.storage.shards import Shard


@dataclass(frozen=True)
class Selection:
    """What of SOURCE is wanted: patterns of component names (none: all), and whether what is fetched stays."""

    components: tuple[str, ...] = ()
    keep_source: bool = False


EVERYTHING = Selection()


@dataclass(frozen=True)
class OpenedSource:
    """An opened SOURCE. ``components`` maps a name ("" for a single one) to its folder or file.

    With a ``store``, these are a skeleton: small files whole, shards as headers with a hole behind them.
    """

    path: Path
    reference: str
    components: dict[str, Path]
    store: Store | None = None
    keep_source: bool = False

    def open_component(self, name: str) -> Component:
        """Return the checked source of a component. Raises FaultsError with every fault found."""
        source = open_component(self.components[name])
        if self.store is None:
            return source
        return replace(source, name=join_names(self.store.name, name), revision=self.store.revision)

    def is_cached(self, component: str, name: str) -> bool:
        """True where the store's own cache holds a file."""
        cache = self.store and self.store.cache
        return bool(cache and cache.find(self.remote_path(component, name)))

    def remote_file(self, component: str, name: str) -> RemoteFile | None:
        """Return what the store tells of a file, None where the source is here."""
        return self.store.files[self.remote_path(component, name)] if self.store else None

    def stated_sha256(self, component: str, name: str) -> dict[str, str]:
        """Return {"sha256": ...} where the store states it of a file; what was fetched was compared with that."""
        file = self.remote_file(component, name)
        return dict([file.checksum]) if file and file.checksum and file.checksum[0] == SHA256 else {}

    def provide_shards(
        self, component: str, shards: tuple[Shard, ...], folder: Path, progress: Progress
    ) -> ShardProvider:
        """Return what hands a component's shards to the engine; those of a store are fetched into ``folder``."""
        if self.store is None:
            return LocalShards(shards)
        remote = {shard.name: self.remote_path(component, shard.name) for shard in shards}
        return FetchedShards(self.store, remote, shards, folder, progress, keep=self.keep_source)

    def remote_path(self, component: str, name: str) -> str:
        """Return where the store has a file of a component."""
        assert self.store
        root = self.store.root
        folder = root.rpartition("/")[0] if root in self.store.files else root
        return join_names(folder, component, name)


@contextmanager
def open_source(
    reference: Reference,
    selection: Selection,
    log: Callable[[str], None],
    scratch: Path,
    pinned_revision: str | None = None,
) -> Iterator[OpenedSource]:
    """Yield SOURCE, opened; a remote one is laid out in the folder ``scratch``, which is removed at the end.

    pinned_revision: the commit that an unfinished run began with. Raises CheckpointError.
    """
    if isinstance(reference, Path):
        if selection.keep_source:
            raise UsageError(f"--keep-source: {reference} is here and always stays. Leave it out.")
        yield OpenedSource(reference, str(reference), _select(reference, selection))
        return
    store = _open_store(reference, selection, pinned_revision, log)
    name = store.name.rpartition("/")[2]
    folder = scratch / ("source" if unsafe_file_name(name) else name)  # messages name it
    shutil.rmtree(scratch, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        path = make_skeleton(store, folder)
        components = _select(path, selection)
        fill_skeleton(store, components, folder, log)
        yield OpenedSource(path, str(reference), components, store, selection.keep_source)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_store(
    reference: HubRef | UrlRef, selection: Selection, pinned_revision: str | None, log: Callable[[str], None]
) -> Store:
    retry = Retry(log, first_contact=True)
    if isinstance(reference, UrlRef):
        from convert_ckpt.source.url import open_url

        if selection.keep_source:
            raise UsageError(f"--keep-source: only the Hub has a cache to keep {reference} in. Copy it first instead.")
        return open_url(reference.url, retry)
    from convert_ckpt.source.hub import open_repo

    return open_repo(reference, retry, pinned_revision, log)


def _select(path: Path, selection: Selection) -> dict[str, Path]:
    """Return the components that are wanted: the transformers, or what patterns name; text encoders only by name."""
    patterns = selection.components
    components = find_components(path, with_text_encoders=bool(patterns))
    if not patterns:
        return components
    unknown = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in components)]
    if unknown:
        known = ", ".join(filter(None, components)) or "none: SOURCE is a single component"
        raise UsageError(f"--component {', '.join(unknown)}: not in SOURCE. Its components: {known}.")
    return {name: path for name, path in components.items() if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    return bool(name) and fnmatchcase(name, pattern)
