"""Tensors of a GGUF file: which of ggml's types hold codes, and what they stand for.

Source: gguf 0.19, constants.py (GGMLQuantizationType, GGML_QUANT_SIZES); ComfyUI-GGUF, tools/convert.py (orig_shape).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.foreign import ForeignTensors
from run_ckpt.contract.formats import Scheme
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.source_formats import BY_ROW, UNKNOWN_RULE, opaque_format
from run_ckpt.contract.tensors import TensorSpec


@dataclass(frozen=True)
class GgmlType:
    """One of ggml's types: ``block`` elements along K take ``nbytes``. ``dtype`` is safetensors' where it has it."""

    name: str
    block: int
    nbytes: int
    dtype: str | None = None


# By their numbers in a file.
GGML_TYPES = {
    0: GgmlType("F32", 1, 4, "F32"),
    1: GgmlType("F16", 1, 2, "F16"),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    20: GgmlType("IQ4_NL", 32, 18),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1, "I8"),
    25: GgmlType("I16", 1, 2, "I16"),
    26: GgmlType("I32", 1, 4, "I32"),
    27: GgmlType("I64", 1, 8, "I64"),
    28: GgmlType("F64", 1, 8, "F64"),
    30: GgmlType("BF16", 1, 2, "BF16"),
}
# Format of a layer -> ggml's type.
GGML_FORMATS = {
    opaque_format(f"gguf_{found.name.lower()}", f"GGUF {found.name}"): found.name
    for found in GGML_TYPES.values()
    if found.dtype is None
}
_FORMAT_OF = {name: quant_format for quant_format, name in GGML_FORMATS.items()}
# Bytes between tensors, which header readers make tensors of their own.
PADDING = "(padding at byte {})"
# What llama.cpp calls the blocks of a language model, whose rows of q and k some of its converters permute.
_OF_LLAMA = ("blk.", "enc.blk.", "dec.blk.")


def read_ggml(
    specs: Mapping[str, TensorSpec], types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], source_dtype: str
) -> ForeignTensors:
    """Return what the tensors of a GGUF file are.

    specs: as they lie in the file, bytes where they are codes. types: tensor -> ggml's type of each that is codes;
    shapes: tensor -> shape of what it stands for. source_dtype: of what they stand for.
    Raises FaultsError for a language model, and for codes that are no rows.
    """
    if any(name.startswith(_OF_LLAMA) for name in specs):
        raise FaultsError(
            "the quantized weights can't be read",
            [
                "it is a language model under llama.cpp's names, with rows in an order of its own. Only diffusion"
                " transformers are read from GGUF. transformers writes it as numbers:"
                " AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE).save_pretrained(OUT)."
            ],
        )
    layers: dict[str, Layer] = {}
    plain_shapes: dict[str, tuple[int, ...]] = {}
    faults = []
    for name, ggml_type in types.items():
        shape = shapes[name]
        if len(shape) < 2 or not specs[name].nbytes or specs[name].nbytes % shape[0]:
            faults.append(
                f"{name}: {ggml_type} {list(shape)} is no matrix in rows of blocks. Give the original checkpoint."
            )
            continue
        module = name.removesuffix(".weight")
        if module in layers:
            faults.append(f"{name}: a weight, and a tensor of the name {module}. Rename one.")
            continue
        scheme = Scheme(_FORMAT_OF[ggml_type], PLAIN, BY_ROW)
        layers[module] = Layer(
            module, scheme, shape[0], math.prod(shape[1:]), name, source_dtype, UNKNOWN_RULE, {WEIGHT: name}, (1,)
        )
        plain_shapes[module] = shape
    if faults:
        raise FaultsError("the quantized weights can't be read", faults)
    padding = PADDING.partition("{")[0]
    return ForeignTensors(layers, frozenset(name for name in specs if name.startswith(padding)), plain_shapes)
