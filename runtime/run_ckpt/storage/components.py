"""A conversion's result: which components it holds, and one of them opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from run_ckpt.contract.errors import ProblemsError
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.contract.manifest_checks import read_checked_manifest
from run_ckpt.storage.checks import header_faults
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.shards import TensorFolder, read_folder


def find_components(output: Path) -> dict[str, Path]:
    """Return component name -> folder of a conversion's result. A single component has the name "".

    The result of a pipeline has no manifest itself, but one in each ``transformer*`` folder.
    """
    if (output / MANIFEST_NAME).exists():
        return {"": output}
    folders = {entry.name: entry for entry in sorted(output.glob("transformer*")) if entry.is_dir()}
    if any((folder / MANIFEST_NAME).exists() for folder in folders.values()):
        return folders
    return {"": output}


@dataclass(frozen=True)
class Checkpoint:
    """A converted component, open. From open_checkpoint its headers are exactly what its manifest implies."""

    path: Path
    manifest: Manifest
    folder: TensorFolder
    reader: TensorReader


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Yield the converted component in folder ``path``, strictly checked but for its tensors' bytes.

    Raises ManifestError, or ProblemsError with every fault of manifest and headers.
    """
    manifest = read_checked_manifest(path)
    folder = read_folder(path)
    problems = header_faults(manifest, folder)
    if problems:
        raise ProblemsError(f"{path}: not the checkpoint that its manifest describes", problems)
    with TensorReader(folder) as reader:
        yield Checkpoint(path, manifest, folder, reader)
