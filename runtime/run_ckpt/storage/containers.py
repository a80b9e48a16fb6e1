"""Weights in other containers than safetensors: what each is, and the way from there."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from run_ckpt.contract.file_names import GGUF_SUFFIX
from run_ckpt.storage.files import open_to_read

# A state dict, or one within a training checkpoint; clone() parts tensors that share memory.
_PICKLES_TO_SAFETENSORS = (
    'python -c "import glob, torch, safetensors.torch as s; [s.save_file({{k: v.clone() for k, v in d.get('
    "'state_dict', d).items() if hasattr(v, 'clone')}}, f.removesuffix('{suffix}') + '.safetensors') for f in"
    " glob.glob('*{suffix}') for d in [torch.load(f, 'cpu', weights_only=True)]]\""
)


@dataclass(frozen=True)
class _Container:
    """A kind of file: told by how it begins, or where it can't be read by how its name ends."""

    name: str
    way: str
    magics: tuple[bytes, ...] = ()
    suffixes: tuple[str, ...] = ()


_ORIGINAL = "Give the model's safetensors files: the repo it was made from, or another revision of it, has them."
_CONTAINERS = (
    _Container(
        "a git-lfs pointer, not the file itself",
        "Fetch the file: run git lfs pull in its repo, or fetch the repo with hf download.",
        magics=(b"version https://git-lfs",),
    ),
    _Container(
        "GGUF",
        f"Its name has to end in {GGUF_SUFFIX}.",
        magics=(b"GGUF",),
        suffixes=(GGUF_SUFFIX,),
    ),
    _Container("a zip archive", "Unpack it, and give the folder with its safetensors files.", suffixes=(".zip",)),
    _Container(
        "a pickle (torch.save), which can run code and is not read here",
        f"In its folder run: {_PICKLES_TO_SAFETENSORS}",
        magics=(b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        suffixes=(".bin", ".ckpt", ".pt", ".pth"),
    ),
    _Container("an ONNX model", _ORIGINAL, suffixes=(".onnx",)),
    _Container("Flax weights", _ORIGINAL, suffixes=(".msgpack",)),
    _Container("TensorFlow weights", _ORIGINAL, magics=(b"\x89HDF",), suffixes=(".h5",)),
)


def describe_container(path: Path) -> str | None:
    """Return what a file of weights is that is no safetensors file, and what to do; None where nothing tells."""
    with open(open_to_read(path), "rb") as file:
        start = file.read(max(len(magic) for kind in _CONTAINERS for magic in kind.magics))
    by_start = (kind for kind in _CONTAINERS if start.startswith(kind.magics))
    by_name = (kind for kind in _CONTAINERS if path.name.endswith(kind.suffixes))
    # An archive begins as a pickle does.
    found = next(chain(by_name, by_start) if path.suffix == ".zip" else chain(by_start, by_name), None)
    return f"{path.name}: {found.name}. {found.way.format(suffix=path.suffix)}" if found else None


def find_container(folder: Path) -> str | None:
    """Return describe_container() of the largest file of weights in a folder that has no safetensors file."""
    suffixes = tuple(suffix for kind in _CONTAINERS for suffix in kind.suffixes)
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.endswith(suffixes)]
    return describe_container(max(found, key=lambda path: path.stat().st_size)) if found else None
