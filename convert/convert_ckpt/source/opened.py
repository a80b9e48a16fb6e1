"""SOURCE opened: a folder to plan from, and the store that holds the rest where it lies elsewhere."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from convert_ckpt.source.component import Component, is_side_file, open_component
from convert_ckpt.source.reference import HubRef, Reference, UrlRef
from convert_ckpt.source.shards import FetchedShards, LocalShards, ShardProvider
from convert_ckpt.source.store import SHA256, RemoteFile, Retry, Store, read_file, read_range
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.file_names import CARD_NAME, CONFIG_NAME, INDEX_SUFFIX, SUFFIX, join_names, unsafe_file_name
from run_ckpt.progress import Progress
from run_ckpt.storage.components import PIPELINE_INDEX_NAME, find_components
from run_ckpt.storage.header import LENGTH_NBYTES, MAX_HEADER_NBYTES
from run_ckpt.storage.shards import Shard

# Most headers fit, so that a shard's header takes one request.
_HEADER_GUESS_NBYTES = 128 * 2**10
_REQUESTS_AT_ONCE = 8
# What a pipeline says of all its components: what they are, and under which licence.
_PIPELINE_FILES = (PIPELINE_INDEX_NAME, CARD_NAME)


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
        yield OpenedSource(reference, str(reference), _select(find_components(reference), selection))
        return
    store = _open_store(reference, selection, pinned_revision, log)
    name = store.name.rpartition("/")[2]
    folder = scratch / ("source" if unsafe_file_name(name) else name)  # messages name it
    shutil.rmtree(scratch, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        path = _make_skeleton(store, folder)
        components = _select(find_components(path), selection)
        _fill(store, components, folder, log)
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


def _select(components: dict[str, Path], selection: Selection) -> dict[str, Path]:
    patterns = selection.components
    if not patterns:
        return components
    unknown = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in components)]
    if unknown:
        known = ", ".join(filter(None, components)) or "none: SOURCE is a single component"
        raise UsageError(f"--component {', '.join(unknown)}: not in SOURCE. Its components: {known}.")
    return {name: path for name, path in components.items() if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    return bool(name) and fnmatchcase(name, pattern)


def _make_skeleton(store: Store, folder: Path) -> Path:
    """Make a hole of the right size for every file of the reference, of the folders in it, and of its pipeline."""
    of_pipeline = _pipeline_files(store)
    for name, file in store.files.items():
        if (_is_near(name, store.root) or name in of_pipeline) and not any(map(unsafe_file_name, name.split("/"))):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as hole:
                hole.truncate(file.nbytes)
    return folder / store.root


def _is_near(name: str, root: str) -> bool:
    """True for the file ``root``, and for files in the folder ``root`` and in the folders right below it."""
    prefix = f"{root}/" if root else ""
    return name == root or (name.startswith(prefix) and name.removeprefix(prefix).count("/") <= 1)


def _pipeline_files(store: Store) -> set[str]:
    folders = (store.root, store.root.rpartition("/")[0])
    return {join_names(folder, name) for folder in folders for name in _PIPELINE_FILES} & store.files.keys()


def _fill(store: Store, components: dict[str, Path], folder: Path, log: Callable[[str], None]) -> None:
    """Put the small files and the shards' headers of the components in their place."""
    retry = Retry(log, first_contact=True)

    def fill(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        read = _read_header if path.name.endswith(SUFFIX) else read_file
        data = read(store, name, retry)
        with open(path, "r+b") as file:
            file.write(data)

    paths = {path for component in components.values() for path in _files_of(component) if _is_read(path)}
    paths |= {folder / name for name in _pipeline_files(store)}
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="header") as pool:
        try:
            list(pool.map(fill, sorted(paths)))
        except BaseException:  # Ctrl-C too: nobody should wait for requests whose answer is not wanted any more
            retry.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _files_of(component: Path) -> list[Path]:
    return [component] if component.is_file() else [path for path in sorted(component.iterdir()) if path.is_file()]


def _is_read(path: Path) -> bool:
    return path.name == CONFIG_NAME or path.name.endswith((SUFFIX, INDEX_SUFFIX)) or is_side_file(path)


def _read_header(store: Store, name: str, retry: Retry) -> bytearray:
    """Return a shard's header as it is; whoever parses it says what is wrong with it."""
    nbytes = store.files[name].nbytes
    data = read_range(store, name, 0, min(_HEADER_GUESS_NBYTES, nbytes), retry)
    end = LENGTH_NBYTES + int.from_bytes(data[:LENGTH_NBYTES], "little")
    if len(data) < end <= min(nbytes, LENGTH_NBYTES + MAX_HEADER_NBYTES):
        data += read_range(store, name, len(data), end, retry)
    return data[:end]
