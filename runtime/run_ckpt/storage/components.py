"""Which components a conversion's result holds."""

from pathlib import Path

from run_ckpt.contract.manifest import MANIFEST_NAME


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
