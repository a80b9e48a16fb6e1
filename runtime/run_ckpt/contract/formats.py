"""The number formats as data. A new weight format is one more record here; README says what else it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from run_ckpt.contract.layouts import AITER, LAYOUTS, PLAIN, Layout
from run_ckpt.contract.tensors import DTYPE_BITS

# OCP Microscaling Formats (MX) v1.0, 5.3.3: sign, 2 exponent bits (bias 1), 1 mantissa bit.
# The value of code 0..7; bit 3 of a code is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Half-way points between neighbouring E2M1 values. Ties go to the even code, so a value on
# the point rounds up where the lower code is odd.
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_TIE_ROUNDS_UP = (False, True, False, True, False, True, False)
# Half of E2M1's last step: the step below 2^(k+1) is 2^(k-1) wide, so amax rounds up to 2^(k+1) from
# 2^(k+1) - 2^(k-2) = 1.75 * 2^k on. A quarter of 2^k, added to the bits of a float32, carries into the exponent there.
ROUND_UP_FROM_1_75 = 1 << 21

# OCP MX v1.0, 5.4.1: value 2^(byte - 127); 255 is NaN.
E8M0_BIAS = 127
E8M0_LARGEST = 254
E8M0_NAN = 255
MX_BLOCK_SIZE = 32

# OCP 8-bit floating point (OFP8), E4M3: largest finite value; codes 0x7F and 0xFF are NaN.
E4M3_MAX = 448.0
E4M3_NAN_MAGNITUDE = 0x7F
# The smallest E4M3 above zero.
E4M3_SMALLEST = 2.0**-9
FP8_BLOCK_SIZE = 128
NVFP4_BLOCK_SIZE = 16
# The largest E2M1 times the largest E4M3 scale: by it amax is divided to give the scale of the whole tensor.
NVFP4_LARGEST = E2M1_VALUES[-1] * E4M3_MAX
# The smallest normal float32.
F32_TINY = 2.0**-126

# Every format of ours rounds to nearest, ties to even.
TIE_RULE = "half_even"
GROUP = "group"


@dataclass(frozen=True)
class ElementFormat:
    """What a weight's codes are. ``dtype`` is the safetensors dtype that holds ``per_byte`` of them in each byte.

    ``largest`` is the largest value, ``nan_magnitude`` the code of NaN without its sign, None where every code is a
    number. ``facts`` go into the manifest.
    """

    name: str
    dtype: str
    per_byte: int
    largest: float
    nan_magnitude: int | None
    facts: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def emax(self) -> int:
        """The exponent of the largest power of two: 2 of E2M1 (4 = 2^2), 8 of E4M3."""
        return math.frexp(self.largest)[1] - 1


@dataclass(frozen=True)
class ScaleFormat:
    """What a scale is. ``dtype`` is the safetensors dtype of the tensor; ``readable`` are those of other tools."""

    name: str
    dtype: str
    readable: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, repr=False)
class QuantFormat:
    """A weight format: elements, scales, and what they leave open.

    ``name`` is its word in options, manifests and configs, ``label`` what people call it.
    ``blocks`` maps a granularity to the [rows, columns] that share a scale, None for the whole axis.
    ``layouts`` are the storage orders that it may have. The first granularity, layout and scale rule are the defaults.
    ``K_granule`` is what K must be a multiple of for whole blocks: 1 where the last block may be narrower.
    A weight below ``min_N`` or not a multiple of ``N_multiple`` and ``K_multiple`` is better left as it is.
    ``is_two_level``: the scales of blocks are in units of one more scale of the whole tensor, F32.
    ``raised_to`` are the formats that a budget may give a layer instead: of more bits, and run by the same machines.
    ``summary`` says in a card what is stored, up to what shares a scale; ``machines`` what runs it, row-major.
    """

    name: str
    label: str
    element: ElementFormat = field(hash=False)
    scale: ScaleFormat = field(hash=False)
    blocks: dict[str, tuple[int | None, int | None]] = field(hash=False)
    layouts: tuple[Layout, ...] = field(hash=False)
    scale_rules: tuple[str, ...]
    K_granule: int
    min_N: int
    N_multiple: int
    K_multiple: int
    summary: str
    machines: str
    is_two_level: bool = False
    raised_to: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of each layer in this format."""
        block = {"block_size": self.blocks[GROUP][1]} if GROUP in self.blocks else {}
        names = {"element_format": self.element.name, "scale_format": self.scale.name, "tie_rule": TIE_RULE}
        return {**names, **self.element.facts, **self.scale.facts, **block}

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Option -> its values, for each that this format leaves open."""
        layouts = tuple(layout.name for layout in self.layouts)
        values = {"layout": layouts, "granularity": tuple(self.blocks), "scale_rule": self.scale_rules}
        return {option: known for option, known in values.items() if len(known) > 1}

    def scale_rule(self, asked: str | None) -> str:
        """Return the rule that was asked for where the format has a choice, else its own."""
        return asked if asked and asked in self.scale_rules else self.scale_rules[0]

    def scheme(self, layout: str | None = None, granularity: str | None = None) -> Scheme:
        """Return how a layer is stored under these options, each as far as the format has a choice there."""
        known = next((known for known in self.layouts if known.name == layout), self.layouts[0])
        return Scheme(
            self, known, granularity if granularity and granularity in self.blocks else next(iter(self.blocks))
        )


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored: its format with what each format leaves open."""

    format: QuantFormat
    layout: Layout
    granularity: str

    def __str__(self) -> str:
        """The options that ask for it."""
        layout = f" --layout {self.layout}" if len(self.format.layouts) > 1 else ""
        granularity = f" --granularity {self.granularity}" if len(self.format.blocks) > 1 else ""
        return f"--format {self.format}{layout}{granularity}"

    @property
    def detail(self) -> str:
        """What was chosen where the format leaves a choice: its layout or its granularity."""
        return self.layout.name if len(self.format.layouts) > 1 else self.granularity

    @property
    def block(self) -> tuple[int | None, int | None]:
        """Rows and columns that share a scale, None for all there are."""
        return self.format.blocks[self.granularity]

    @property
    def is_per_tensor(self) -> bool:
        """True where the whole weight has one scale and no other."""
        return self.block == (None, None)

    @property
    def has_tensor_scale(self) -> bool:
        """True where a scale is known only once the whole weight was seen."""
        return self.is_per_tensor or self.format.is_two_level

    @cached_property
    def alignment(self) -> tuple[int, int]:
        """What N and K have to be multiples of to be stored at all."""
        rows = max(self.layout.weight.tile[0], self.layout.scale.tile[0])
        return rows, math.lcm(self.format.K_granule, self.format.element.per_byte * self.layout.weight.tile[1])

    @cached_property
    def row_multiple(self) -> int:
        """Rows that a slab is cut at: those that share scales or a tile. Layouts agree, as error sums depend on it."""
        return max(self.block[0] or 1, *(layout.scale.tile[0] for layout in self.format.layouts))

    def scale_grid(self, N: int, K: int) -> tuple[int, int]:
        """Return [block rows, block columns] of an [N, K] weight: the shape of its scales without padding."""
        rows, cols = self.block
        return -(-N // (rows or N)), -(-K // (cols or K))

    def nbytes(self, N: int, K: int) -> int:
        """Return the bytes of an [N, K] weight and its scales, those of blocks padded as the layout wants."""
        scales = math.prod(self.layout.scale.padded_shape(*self.scale_grid(N, K)))
        n_tensor_scales = int(self.format.is_two_level)
        return (
            N * K // self.format.element.per_byte
            + (scales * DTYPE_BITS[self.format.scale.dtype] + 32 * n_tensor_scales) // 8
        )

    def scale_rows(self, start: int, stop: int) -> slice:
        """Return which rows of the grid belong to rows start..stop of the weight; start is that of a block."""
        rows = self.block[0]
        return slice(start // rows, -(-stop // rows)) if rows else slice(0, 1)


E2M1 = ElementFormat(
    "e2m1", "U8", per_byte=2, largest=E2M1_VALUES[-1], nan_magnitude=None, facts={"nibble_order": "low_is_even_k"}
)
E4M3 = ElementFormat("e4m3fn", "F8_E4M3", per_byte=1, largest=E4M3_MAX, nan_magnitude=E4M3_NAN_MAGNITUDE)
E8M0 = ScaleFormat("e8m0", "U8", readable=("U8", "F8_E8M0"), facts={"scale_bias": E8M0_BIAS})
F32 = ScaleFormat("f32", "F32", readable=("F32", "BF16", "F16"))
E4M3_SCALE = ScaleFormat("e4m3fn", "F8_E4M3", readable=("F8_E4M3",), facts={"tensor_scale_format": "f32"})

MXFP4 = QuantFormat(
    name="mxfp4",
    label="MXFP4",
    element=E2M1,
    scale=E8M0,
    blocks={GROUP: (1, MX_BLOCK_SIZE)},
    layouts=(AITER, PLAIN),
    scale_rules=("even", "floor", "roundup", "mse"),
    K_granule=MX_BLOCK_SIZE,
    # gemm_a4w4 returns wrong rows for small N in its untuned heuristic, and SGLang keeps such layers
    # BF16 (multimodal_gen/.../mxfp4.py:38-41). Composable Kernel reads the scales of 32 rows together.
    min_N=256,
    N_multiple=32,
    K_multiple=MX_BLOCK_SIZE,
    summary="E2M1 weights, an E8M0 scale",
    machines="AMD Instinct MI350 series (gfx950); vLLM emulates it elsewhere.",
    raised_to=("fp8",),
)
MXFP8 = QuantFormat(
    name="mxfp8",
    label="MXFP8",
    element=E4M3,
    scale=E8M0,
    blocks={GROUP: (1, MX_BLOCK_SIZE)},
    layouts=(PLAIN,),
    # By "floor" up to an eighth of a block's binade saturates: 448 is 1.75 * 2^8.
    scale_rules=("roundup", "floor"),
    K_granule=MX_BLOCK_SIZE,
    min_N=1,
    N_multiple=16,
    K_multiple=MX_BLOCK_SIZE,
    summary="float8_e4m3fn, an E8M0 scale",
    machines="NVIDIA Blackwell (compute capability 10.0 and newer) and AMD MI350 series (gfx950); others by Triton.",
)
NVFP4 = QuantFormat(
    name="nvfp4",
    label="NVFP4",
    element=E2M1,
    scale=E4M3_SCALE,
    blocks={GROUP: (1, NVFP4_BLOCK_SIZE)},
    layouts=(PLAIN,),
    scale_rules=("amax_over_6",),
    K_granule=NVFP4_BLOCK_SIZE,
    min_N=1,
    # Blackwell's kernels take both in 32s, or SGLang pads each weight at load.
    N_multiple=32,
    K_multiple=32,
    summary="E2M1 weights, an F32 scale for each layer, an E4M3 one",
    machines="NVIDIA Blackwell (compute capability 10.0 and newer); others by Triton.",
    is_two_level=True,
    raised_to=("fp8",),
)
FP8 = QuantFormat(
    name="fp8",
    label="FP8",
    element=E4M3,
    scale=F32,
    blocks={"tensor": (None, None), "channel": (1, None), "block": (FP8_BLOCK_SIZE, FP8_BLOCK_SIZE)},
    layouts=(PLAIN,),
    scale_rules=("amax_over_448",),
    K_granule=1,
    # torch's scaled matmul and CUTLASS want both multiples of 16.
    min_N=1,
    N_multiple=16,
    K_multiple=16,
    summary="float8_e4m3fn, one F32 scale",
    machines=(
        "GPUs with FP8 units: NVIDIA of compute capability 8.9 and newer; AMD MI350 series (gfx950); MI300 series"
        " (gfx942), whose runtimes turn the same bits into e4m3fnuz at load."
    ),
)

FORMATS: dict[str, QuantFormat] = {quant_format.name: quant_format for quant_format in (MXFP4, NVFP4, MXFP8, FP8)}
SCALE_RULES = MXFP4.scale_rules
GRANULARITIES = tuple(FP8.blocks)

AITER_MXFP4 = Scheme(MXFP4, AITER, GROUP)
PLAIN_MXFP4 = Scheme(MXFP4, PLAIN, GROUP)
PLAIN_MXFP8 = Scheme(MXFP8, PLAIN, GROUP)
PLAIN_NVFP4 = Scheme(NVFP4, PLAIN, GROUP)
TENSOR_FP8 = Scheme(FP8, PLAIN, "tensor")
CHANNEL_FP8 = Scheme(FP8, PLAIN, "channel")
BLOCK_FP8 = Scheme(FP8, PLAIN, "block")


def read_scheme(format_name: str, layout: str, granularity: str) -> Scheme:
    """Return a scheme by its names in a manifest. Raises ValueError for a format or layout that is none of ours."""
    quant_format = FORMATS.get(format_name)
    if quant_format is None or LAYOUTS.get(layout) not in quant_format.layouts:
        raise ValueError(f"format {format_name!r} in layout {layout!r} is unknown")
    return Scheme(quant_format, LAYOUTS[layout], granularity)
