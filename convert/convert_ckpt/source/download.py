"""One file of a store brought to this machine: in ranges, compared with its checksum, continued where it ended."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from convert_ckpt.source.store import Checksum, Retry, Store, read_range
from run_ckpt.contract.errors import FetchError

# One connection rarely fills a line. Four parts are in memory at once, 128 MiB; at up to 335 MB/s they stay under the
# 3,000 requests in five minutes that the Hub answers to the anonymous (https://huggingface.co/docs/hub/rate-limits).
_REQUESTS_AT_ONCE = 4
_PART_NBYTES = 32 * 2**20


def download(store: Store, remote: str, path: Path, retry: Retry, advance: Callable[[int], None]) -> None:
    """Make ``path`` the whole file ``remote``, continuing where it ends.

    ``advance`` is told of each byte that is here. A continued file whose checksum is wrong is fetched once more, from
    the start. Raises FetchError.
    """
    file = store.files[remote]
    if path.exists() and path.stat().st_size > file.nbytes:
        path.unlink()
    is_continued = path.exists()
    while fault := _append(store, remote, path, retry, advance):
        path.unlink()
        advance(-file.nbytes)
        if not is_continued:
            raise FetchError(fault)
        is_continued = False
    store.check_unchanged(remote)


def _append(store: Store, remote: str, path: Path, retry: Retry, advance: Callable[[int], None]) -> str | None:
    """Fetch what the file lacks; return a sentence where its checksum is wrong."""
    file = store.files[remote]
    checksum = Checksum(remote, file)
    checksum.update_from(path)
    with open(path, "ab") as out:
        start = out.tell()
        advance(start)
        for part in _read_parts(store, remote, range(start, file.nbytes, _PART_NBYTES), retry):
            out.write(part)
            out.flush()
            checksum.update(part)
            advance(len(part))
    return checksum.fault()


def _read_parts(store: Store, remote: str, starts: range, retry: Retry) -> Iterator[bytearray]:
    """Yield the parts of a file in order, several of them on their way at a time."""
    pending: deque[Future[bytearray]] = deque()
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="range") as pool:
        try:
            for start in starts:
                pending.append(
                    pool.submit(read_range, store, remote, start, min(start + _PART_NBYTES, starts.stop), retry)
                )
                if len(pending) == _REQUESTS_AT_ONCE:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
