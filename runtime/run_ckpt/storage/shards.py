"""A folder (or single file) of safetensors shards: which files belong to it, all checked together."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from run_ckpt.contract.errors import FaultsError, HeaderError
from run_ckpt.contract.file_names import GGUF_SUFFIX, INDEX_SUFFIX, SUFFIX, unsafe_file_name
from run_ckpt.storage.containers import find_container
from run_ckpt.storage.files import MAX_INDEX_NBYTES, read_text
from run_ckpt.storage.gguf import read_gguf_header
from run_ckpt.storage.header import Header, StoredTensor, read_header

# The names under which diffusers and transformers look for a model's weights.
MAIN_STEMS = ("diffusion_pytorch_model", "model")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")


@dataclass(frozen=True)
class Shard:
    """One safetensors file and its checked header."""

    path: Path
    header: Header

    @cached_property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class TensorFolder:
    """The shards of one checkpoint, by name. ``index_name`` is None where there is no index."""

    root: Path
    shards: tuple[Shard, ...]
    index_name: str | None
    notes: tuple[str, ...]

    def tensors(self) -> Iterator[tuple[Shard, StoredTensor]]:
        """Yield every tensor with its shard, shard by shard, by rising offset."""
        for shard in self.shards:
            for tensor in shard.header.tensors:
                yield shard, tensor


def read_shard(path: Path) -> Header:
    """Return the checked header of a .safetensors or .gguf file. Raises HeaderError."""
    return read_gguf_header(path) if path.suffix == GGUF_SUFFIX else read_header(path)


def read_folder(path: Path, read: Callable[[Path], Header] = read_shard) -> TensorFolder:
    """Return the checkpoint at ``path``, a folder, or one .safetensors or .gguf file, every header checked.

    read: returns the checked header of a shard, raises as read_header.
    Raises FaultsError with all faults: missing, truncated or duplicated shards, an index that
    disagrees with them or names a file outside the folder, and every fault of read_header.
    """
    faults: list[str] = []
    notes: list[str] = []
    if path.is_file():
        root, index_name, names, weight_map = path.parent, None, [path.name], None
    else:
        root, index_name = path, _find_index(path, faults)
        if index_name:
            weight_map = _read_index(path / index_name, faults)
            names = sorted(set(weight_map.values()))
            notes += _unlisted_notes(path, names, index_name)
        else:
            weight_map = None
            names = _find_files(path, faults, notes)
    shards = read_shards(root, names, read, faults)
    if weight_map is None and (copies := _same_tensors(shards)):
        faults.append(_give_one(root, copies))
    else:
        faults += _duplicate_faults(shards)
    if weight_map is not None:
        faults += _index_faults(weight_map, shards, {shard.name for shard in shards})
    if faults:
        raise FaultsError(f"{path.name}: not a readable checkpoint", faults)
    return TensorFolder(root, tuple(shards), index_name, tuple(notes))


def _find_index(folder: Path, faults: list[str]) -> str | None:
    indexes = sorted(entry.name for entry in folder.glob("*" + INDEX_SUFFIX))
    for stem in MAIN_STEMS:
        if stem + INDEX_SUFFIX in indexes:
            return stem + INDEX_SUFFIX
    if len(indexes) > 1:
        faults.append(f"several indexes and none of the usual name: {indexes}. Leave the one to convert.")
    return indexes[0] if indexes else None


def _read_index(path: Path, faults: list[str]) -> dict[str, str]:
    try:
        weight_map = json.loads(read_text(path, MAX_INDEX_NBYTES))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is not a map of text to text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        faults.append(f"{path.name}: not a usable index ({type(error).__name__}: {error}). Fetch it again.")
        return {}
    unsafe = sorted(name for name in set(weight_map.values()) if unsafe_file_name(name))
    faults += [f"{path.name}: names {name!r}, which is not a file of this folder." for name in unsafe]
    return {tensor: name for tensor, name in weight_map.items() if name not in unsafe}


def _find_files(folder: Path, faults: list[str], notes: list[str]) -> list[str]:
    names = sorted(entry.name for entry in folder.glob("*" + SUFFIX))
    if not names:
        if len(gguf := sorted(entry.name for entry in folder.glob("*" + GGUF_SUFFIX))) == 1:
            return gguf
        other = _give_one(folder, gguf) if gguf else find_container(folder)
        faults.append(other or f"it holds no .safetensors file. {_what_to_give(folder)}")
    for stem in MAIN_STEMS:
        if stem + SUFFIX in names:
            notes += [f"{name}: left out, {stem + SUFFIX} is there" for name in names if name != stem + SUFFIX]
            return [stem + SUFFIX]
    faults += _missing_number_faults(names)
    return names


def shard_count(name: str) -> int:
    """Return of how many shards a file is one, by its name: 1 for a whole checkpoint."""
    match = _NUMBERED.fullmatch(name)
    return int(match["total"]) if match else 1


def _missing_number_faults(names: list[str]) -> list[str]:
    present: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            present.setdefault((match["stem"], int(match["total"])), set()).add(int(match["number"]))
    faults = []
    for (stem, total), numbers in sorted(present.items()):
        missing = sorted(set(range(1, total + 1)) - numbers)
        if missing:
            faults.append(f"{stem}: shards {missing} of {total} are missing. Fetch them.")
    return faults


def _unlisted_notes(folder: Path, listed: list[str], index_name: str) -> list[str]:
    present = sorted(entry.name for entry in folder.glob("*" + SUFFIX))
    return [f"{name}: left out, {index_name} does not list it" for name in present if name not in listed]


def read_shards(root: Path, names: Iterable[str], read: Callable[[Path], Header], faults: list[str]) -> list[Shard]:
    """Return the shards ``names`` in ``root``, as ``read`` returns them; what is wrong is added to ``faults``."""
    shards = []
    for name in names:
        path = root / name
        try:
            shards.append(Shard(path, read(path)))
        except HeaderError as error:
            faults.append(str(error))
        except FileNotFoundError:
            faults.append(f"{name}: missing. Fetch this shard.")
        except OSError as error:
            faults.append(f"{name}: missing, or not readable: {error.strerror}. Fetch this shard.")
    return shards


def _give_one(folder: Path, names: list[str]) -> str:
    return (
        f"{', '.join(names)}: each is a model of its own. Give one of these files: {folder.name}/{names[0]}, of a repo"
        f" of the Hub hf://owner/name/{names[0]}."
    )


def _same_tensors(shards: list[Shard]) -> list[str]:
    """Return the files that share tensors where one has none that the others lack; [] where there is no such file."""
    counts = _count_holders(shards)
    held = {shard.name: [counts[tensor.spec.name] > 1 for tensor in shard.header.tensors] for shard in shards}
    is_copy = any(shared and all(shared) and not _NUMBERED.fullmatch(name) for name, shared in held.items())
    return [name for name, shared in held.items() if any(shared)] if is_copy else []


def _count_holders(shards: list[Shard]) -> Counter[str]:
    return Counter(tensor.spec.name for shard in shards for tensor in shard.header.tensors)


def _duplicate_faults(shards: list[Shard]) -> list[str]:
    counts = _count_holders(shards)
    faults = []
    for name in sorted(name for name, count in counts.items() if count > 1):
        holders = [s.name for s in shards if any(t.spec.name == name for t in s.header.tensors)]
        faults.append(f"{name}: stored in {' and '.join(holders)}. Remove the copy that does not belong.")
    return faults


def _index_faults(weight_map: dict[str, str], shards: list[Shard], readable: set[str]) -> list[str]:
    stored = {tensor.spec.name: shard.name for shard in shards for tensor in shard.header.tensors}
    faults = []
    for name, shard_name in sorted(weight_map.items()):
        if shard_name in readable and stored.get(name) != shard_name:
            where = stored.get(name)
            faults.append(
                f"{name}: the index says {shard_name}, "
                + (f"but it is in {where}." if where else "but that shard does not hold it.")
            )
    faults += [f"{name}: in {stored[name]} but not in the index." for name in sorted(set(stored) - set(weight_map))]
    return faults


def _what_to_give(folder: Path) -> str:
    """Return which folder below was meant: of a pipeline, a checkpoint, or the snapshot in the Hub's cache."""
    patterns = ("*/" * depth + name for depth in (1, 2, 3) for name in ("model_index.json", f"*{SUFFIX}"))
    found = next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)
    return f"Did you mean {found.parent}?" if found else "Give the folder that holds config.json and the weights."
