"""A remote source laid out for the plan: holes of the right size, then small files and the shards' headers in them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert_ckpt.source.store import Retry, Store, read_file, read_range
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.file_names import (
    CARD_NAME,
    CONFIG_NAME,
    GGUF_SUFFIX,
    INDEX_SUFFIX,
    SUFFIX,
    join_names,
    unsafe_file_name,
)
from run_ckpt.storage.components import PIPELINE_INDEX_NAME
from run_ckpt.storage.header import LENGTH_NBYTES, MAX_HEADER_NBYTES
from run_ckpt.storage.side_files import is_side_file

# Most headers fit, so that a shard's header takes one request.
_HEADER_GUESS_NBYTES = 128 * 2**10
_REQUESTS_AT_ONCE = 8
# What a pipeline says of all its components: what they are, and under which licence.
_PIPELINE_FILES = (PIPELINE_INDEX_NAME, CARD_NAME)


def make_skeleton(store: Store, folder: Path) -> Path:
    """Make holes for the files that are meant, in folders below and of the pipeline too; return where they are."""
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


def fill_skeleton(store: Store, components: dict[str, Path], folder: Path, log: Callable[[str], None]) -> None:
    """Put the small files and the shards' headers of the components in their place."""
    retry = Retry(log, first_contact=True)

    def fill(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        read = _read_header if path.name.endswith(SUFFIX) else read_file
        data = read(store, name, retry)
        with open(path, "r+b") as file:
            file.write(data)

    for component in components.values():
        names = [path.name for path in _files_of(component)]
        if any(name.endswith(GGUF_SUFFIX) for name in names) and not any(name.endswith(SUFFIX) for name in names):
            raise CheckpointError(f"{names[0]}: GGUF is read where it lies. Fetch it first: hf download.")
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
