"""Which machines and kernels each stored form is for, as sentences of the model card."""

from run_ckpt.contract.manifest import Layer

_FP8_MACHINES = (
    "GPUs with FP8 units: NVIDIA of compute capability 8.9 and newer; AMD MI350 series (gfx950); MI300 series (gfx942),"
    " whose runtimes turn the same bits into e4m3fnuz at load."
)

# (format, layout or granularity) -> where it runs.
HARDWARE = {
    ("mxfp4", "aiter"): (
        "**MXFP4, pre-shuffled** (E2M1 weights, an E8M0 scale for each 32 along K): AMD Instinct MI350 series (gfx950)"
        " with AITER 0.1.14 or newer. Weights lie in the order of `shuffle_weight(w, (16, 16))` and scales in that of"
        " `e8m0_shuffle`, so `gemm_a4w4` reads both as they are stored. Every other machine needs a loader that undoes"
        " the order, which is exact; what does not know the order must not load it."
    ),
    ("mxfp4", "plain"): (
        "**MXFP4, row-major** (E2M1 weights, an E8M0 scale for each 32 along K): AMD Instinct MI350 series (gfx950);"
        " vLLM emulates it elsewhere."
    ),
    ("fp8", "tensor"): f"**FP8** (float8_e4m3fn, one F32 scale for each layer): {_FP8_MACHINES}",
    ("fp8", "channel"): f"**FP8** (float8_e4m3fn, one F32 scale for each row): {_FP8_MACHINES}",
    ("fp8", "block"): f"**FP8** (float8_e4m3fn, one F32 scale for each 128 × 128 block): {_FP8_MACHINES}",
}


def hardware_key(layer: Layer) -> tuple[str, str]:
    """Return the key of HARDWARE for a layer."""
    return (layer.format, layer.layout if layer.format == "mxfp4" else layer.granularity)
