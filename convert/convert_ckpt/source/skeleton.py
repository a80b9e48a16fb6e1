"""A remote source laid out for the plan: holes of the right size, then small files and the shards' headers in them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from convert_ckpt.source.store import Retry, Store, read_file, read_range
from run_ckpt.contract.errors import HeaderError
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
from run_ckpt.storage.gguf import parse_gguf_header
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
        read = next((read for suffix, read in _HEADER_READERS.items() if name.endswith(suffix)), read_file)
        data = read(store, name, retry)
        with open(path, "r+b") as file:
            file.write(data)

    paths = {path for component in components.values() for path in _files_to_read(component)}
    paths |= {folder / name for name in _pipeline_files(store)}
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="header") as pool:
        try:
            list(pool.map(fill, sorted(paths)))
        except BaseException:  # Ctrl-C too: nobody should wait for requests whose answer is not wanted any more
            retry.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _files_to_read(component: Path) -> list[Path]:
    """Return the files that the plan is made from; of several GGUF files none, as it wants one."""
    if component.is_file():
        return [component]
    files = [path for path in component.iterdir() if path.is_file()]
    gguf = [path for path in files if path.name.endswith(GGUF_SUFFIX)]
    has_safetensors = any(path.name.endswith(SUFFIX) for path in files)
    return [path for path in files if _is_read(path)] + gguf * (len(gguf) == 1 and not has_safetensors)


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


def _read_gguf_header(store: Store, name: str, retry: Retry) -> bytearray:
    """Return the start of a GGUF file, its header or what shows that it has none. Nothing in it says how long it is."""
    nbytes, data, taken = store.files[name].nbytes, bytearray(), 0

    def take(count: int) -> bytes:
        nonlocal taken
        taken += count
        while len(data) < min(taken, nbytes):
            stop = min(max(taken, 2 * len(data), _HEADER_GUESS_NBYTES), nbytes)
            data.extend(read_range(store, name, len(data), stop, retry))
        return bytes(data[taken - count : taken])

    with suppress(HeaderError):  # whoever parses it again says what is wrong with it
        parse_gguf_header(name, take, nbytes)
    return data


_HEADER_READERS = {SUFFIX: _read_header, GGUF_SUFFIX: _read_gguf_header}
