"""The small files beside a component's shards, which are carried along as they are."""

from pathlib import Path

from run_ckpt.contract.file_names import CONFIG_NAME, INDEX_SUFFIX, SUFFIX

# Weights in other containers and other variants are not carried along.
WEIGHT_SUFFIXES = (
    SUFFIX,
    INDEX_SUFFIX,
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    ".index.json",
)
_LARGEST_SIDE_FILE_NBYTES = 64 * 2**20


def is_side_file(path: Path) -> bool:
    """True for a small file that is carried along as it is."""
    return (
        not path.name.startswith(".")
        and path.name != CONFIG_NAME
        and not path.name.endswith(WEIGHT_SUFFIXES)
        and path.stat().st_size <= _LARGEST_SIDE_FILE_NBYTES
    )
