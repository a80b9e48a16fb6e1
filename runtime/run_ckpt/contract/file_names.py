"""Names of the files of a checkpoint's folder, and of what is looked up in them."""

from pathlib import PurePosixPath, PureWindowsPath

CONFIG_NAME = "config.json"
# Its key that says how the weights are quantized, in whatever words of a consumer.
CONFIG_KEY = "quantization_config"
# What `run-ckpt push` adds to a result's files: about the checkpoint, not part of it.
CARD_NAME = "README.md"
MAP_NAME = "sqnr_map.svg"
SUFFIX = ".safetensors"
GGUF_SUFFIX = ".gguf"
# How the names of a pipeline's text encoders begin.
TEXT_ENCODER = "text_encoder"
INDEX_SUFFIX = ".safetensors.index.json"


def join_names(*names: str) -> str:
    """Return a path within a checkpoint or a store; "" stands for the folder itself and leaves no trace."""
    return "/".join(filter(None, names))


def as_safetensors(name: str) -> str:
    """Return what the file of safetensors is called that is made of a shard."""
    return name.removesuffix(GGUF_SUFFIX) + SUFFIX if name.endswith(GGUF_SUFFIX) else name


def unsafe_file_name(name: str) -> bool:
    """True where ``name`` is not the plain name of a file in the same folder."""
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    is_odd = "\0" in name or any("\ud800" <= char <= "\udfff" for char in name)  # half a character
    return not name or name in (".", "..") or is_odd or parts != (name, name)
