"""`run-ckpt push`: a result to the Hub, shard by shard, and what makes it complete in the last commit."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType

from run_ckpt.contract.differences import manifest_differences
from run_ckpt.contract.errors import FaultsError, PublishError
from run_ckpt.contract.file_names import CARD_NAME, MAP_NAME, SUFFIX, join_names
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.progress import Progress
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.error_map import color_ranges, draw_errors, make_grids
from run_ckpt.tools.publish.repository import LocalFile, Repository, Target, open_repository
from run_ckpt.tools.publish.rows import ConvertedComponent, read_result
from run_ckpt.tools.publish.tool_url import tool_url
from run_ckpt.tools.verify.files import file_faults

_CARD_FILES = (CARD_NAME, MAP_NAME)
_LAST_MESSAGE = "Add configuration, manifest and model card"


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    n_files: int
    sent: tuple[LocalFile, ...] = ()
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.sent and not self.removed:
            return f"{self.url} holds all {self.n_files} files: nothing to push."
        nbytes = format_nbytes(sum(file.nbytes for file in self.sent))
        removed = f", removed {len(self.removed)} that were there" if self.removed else ""
        return f"Pushed {len(self.sent)} of {self.n_files} files ({nbytes}) to {self.url}{removed}"


def push_result(output: Path, target: Target, *, base_model: str | None, progress: Progress) -> Pushed:
    """Make the repo hold the result at ``output``; send what it lacks, shards first, all else in the last commit.

    Raises PublishError where the repo holds something else (unless ``target.overwrite``) or the Hub refuses,
    FaultsError where a file is not as its manifest says: then nothing was sent.
    """
    components = read_result(output)
    repository = open_repository(target)
    files = _verified_files(components, progress)
    files += card_files(components, target, base_model)
    return _send(repository, files, target, progress)


class ShardUploads:
    """Shards uploaded while later ones are still being made, on a thread of its own.

    Best effort: a failure is said, and push_result() sends what is missing.
    """

    def __init__(self, target: Target, progress: Progress, *, at_end: bool = False):
        self._repository = open_repository(target, show_bars=False)
        self._overwrite = target.overwrite
        self._at_end = at_end
        self._log = progress.log
        self._queue: SimpleQueue[LocalFile | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._stopped = False
        self.sent: list[LocalFile] = []

    def start(self, names: Iterable[str], manifests: Mapping[str, Manifest] = MappingProxyType({})) -> None:
        """Begin, with the names of all shards to come, and component -> its manifest without what is measured.

        Raises PublishError if the repo holds something else. A finished result in it that may be the very one which
        is being made is compared at the end: nothing is sent before.
        """
        held = _visible(self._repository)
        if any(name.endswith(MANIFEST_NAME) for name in held) or (self._overwrite and held):
            if not self._overwrite:
                self._check_manifests(manifests)
            self._log(f"{self._repository.url} is not empty: it is compared, and shards are sent, at the end")
            self._stopped = True
        elif foreign := sorted(held - set(names)):
            raise _holds_something_else(self._repository, foreign)
        self._stopped = self._stopped or self._at_end
        self._thread.start()

    def add(self, name: str, path: Path, nbytes: int) -> None:
        """Note that a shard is finished."""
        self._queue.put(LocalFile(name, path, nbytes))

    def stop(self) -> None:
        """Return once the shard that is being sent is done. The others are left to push_result()."""
        self._stopped = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _check_manifests(self, manifests: Mapping[str, Manifest]) -> None:
        for component, planned in manifests.items():
            name = join_names(component, MANIFEST_NAME)
            if name not in self._repository.files:
                continue
            different = manifest_differences(self._repository.read_manifest(name), planned)
            if different:
                raise PublishError(
                    f"{self._repository.url}: holds another result ({different[0]}). Choose another repo or --revision,"
                    " or replace it with --overwrite."
                )

    def _work(self) -> None:
        while (file := self._queue.get()) is not None:
            if self._stopped or self._repository.holds(file):
                continue
            try:
                if file.name in self._repository.files:
                    raise _holds_something_else(self._repository, [file.name])
                self._repository.commit([file], f"Add {file.name}")
                self.sent.append(file)
                self._log(f"pushed {file.name} ({format_nbytes(file.nbytes)})")
            except PublishError as error:
                self._log(f"not pushed for now: {error}")


def _verified_files(components: Sequence[ConvertedComponent], progress: Progress) -> list[LocalFile]:
    """Return every file that the manifests list, and the manifests, each found to be as it should."""
    files, faults = [], []
    for component in components:
        listed = component.manifest.files
        progress.start(f"hash {component.name}".strip(), sum(entry["nbytes"] for entry in listed.values()))
        faults += file_faults(component.path, listed, "the manifest", progress)
        sizes = {name: entry["nbytes"] for name, entry in listed.items()}
        sizes[MANIFEST_NAME] = (component.path / MANIFEST_NAME).stat().st_size
        for name, nbytes in sizes.items():
            files.append(LocalFile(join_names(component.name, name), component.path / name, nbytes))
    if faults:
        raise FaultsError("nothing was pushed: the checkpoint is damaged", faults)
    return files


def card_files(components: Sequence[ConvertedComponent], target: Target, base_model: str | None) -> Iterator[LocalFile]:
    rows = [row for component in components for row in component.rows]
    picture = draw_errors(make_grids(rows), color_ranges(rows))
    if picture:
        yield _in_memory(MAP_NAME, picture.encode())
    url = tool_url(target.tool_url)
    card = make_card(components, target.repo_id, base_model=base_model, has_map=bool(picture), url=url)
    yield _in_memory(CARD_NAME, card.encode())


def _in_memory(name: str, data: bytes) -> LocalFile:
    return LocalFile(name, data, len(data))


def _send(repository: Repository, files: list[LocalFile], target: Target, progress: Progress) -> Pushed:
    ours = {file.name: file for file in files}
    other = sorted(name for name in _visible(repository) if name not in ours or not repository.holds(ours[name]))
    if other and _is_complete(repository, files) and set(other) <= set(_CARD_FILES) and not target.overwrite:
        progress.log(f"{' and '.join(other)} differ there and stay as they are; --overwrite replaces them")
        return Pushed(repository.url, len(files))
    if other and not target.overwrite:
        raise _holds_something_else(repository, other)
    missing = [file for file in files if not repository.holds(file)]
    for file in missing:
        if file.name.endswith(SUFFIX):
            # Beside other content a shard must not be seen before the last commit takes that away.
            repository.stage([file]) if other else repository.commit([file], f"Add {file.name}")
            progress.log(f"pushed {file.name} ({format_nbytes(file.nbytes)})")
    last = [file for file in missing if not file.name.endswith(SUFFIX)]
    stale = [name for name in other if name not in ours]
    if last or other:
        repository.commit(last, target.commit_message or _LAST_MESSAGE, deleted=stale)
    return Pushed(repository.url, len(files), tuple(missing), tuple(stale))


def _is_complete(repository: Repository, files: list[LocalFile]) -> bool:
    return all(repository.holds(file) for file in files if file.name not in _CARD_FILES)


def _visible(repository: Repository) -> set[str]:
    """Return the files of the repo, less those that the Hub makes itself (.gitattributes)."""
    return {name for name in repository.files if not name.startswith(".")}


def _holds_something_else(repository: Repository, names: list[str]) -> PublishError:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return PublishError(
        f"{repository.url}: holds something else ({some}). Choose another repo or --revision,"
        " or replace it with --overwrite."
    )
