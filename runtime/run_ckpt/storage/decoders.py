"""How rows of a weight become numbers in formats that are only read (contract/source_formats.py)."""

from collections.abc import Callable
from functools import partial

import numpy as np

from run_ckpt.contract.ggml import GGML_FORMATS
from run_ckpt.contract.manifest import Layer
from run_ckpt.extras import naming_extras

# Reads bytes of the tensor that plays a role: role, first byte, count.
ReadPart = Callable[[str, int, int], np.ndarray]
# Returns float32 [n, K]: the rows from ``row`` on, whose codes are uint8 [n, bytes of a row].
Decoder = Callable[[Layer, int, np.ndarray, ReadPart], np.ndarray]


def as_stored(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return scales, uint8 as they lie in a file, as bytes where they are codes, else as float32."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return data.view(np.float32) if dtype == "F32" else data


@naming_extras("reading GGUF")
def _decode_ggml(name: str, layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(codes, GGMLQuantizationType[name])
    return values.reshape(len(codes), layer.K)


# Name of a format -> what decodes it.
DECODERS: dict[str, Decoder] = {
    quant_format.name: partial(_decode_ggml, name) for quant_format, name in GGML_FORMATS.items()
}
