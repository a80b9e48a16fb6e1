"""Calibrated activation ranges: a safetensors file with ``<layer>.input_amax`` F32 per layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.contract.formats import E4M3_MAX
from run_ckpt.contract.manifest import Layer
from run_ckpt.storage.header import read_header

_SUFFIX = ".input_amax"


@dataclass(frozen=True)
class Calibration:
    """``amax`` maps a module to the largest |input| seen, float32."""

    file_name: str
    amax: dict[str, float]


def read_calibration(path: Path) -> Calibration:
    """Return the file's ranges. Raises UsageError where it is not such a file."""
    try:
        header = read_header(path)
        amax = {}
        with open(path, "rb") as file:
            for tensor in header.tensors:
                if not tensor.spec.name.endswith(_SUFFIX) or tensor.spec.dtype != "F32" or tensor.spec.nbytes != 4:
                    raise UsageError(
                        f"{path.name}: {tensor.spec.name}: expected one F32 value named <layer>{_SUFFIX},"
                        f" found {tensor.spec.dtype} {list(tensor.spec.shape)}."
                    )
                file.seek(tensor.offset)
                amax[tensor.spec.name.removesuffix(_SUFFIX)] = float(np.frombuffer(file.read(4), "<f4")[0])
    except (OSError, CheckpointError) as error:
        raise UsageError(f"--calibration {path}: {error}") from error
    return Calibration(path.name, amax)


def calibration_faults(calibration: Calibration, layers: Mapping[str, Layer]) -> list[str]:
    """Return a sentence for every quantized layer without a usable range."""
    faults = []
    for module in layers:
        amax = calibration.amax.get(module)
        if amax is None:
            faults.append(f"{module}: {calibration.file_name} holds no {module}{_SUFFIX}. Calibrate it or --ignore it.")
        elif not (np.isfinite(amax) and amax > 0):
            faults.append(f"{module}: {calibration.file_name} says input_amax {amax}, not a positive number.")
    return faults


def input_scales(calibration: Calibration, layers: Mapping[str, Layer]) -> dict[str, np.float32]:
    """Return module -> amax / 448 in float32, one value within a fused group (its largest)."""
    largest: dict[str, float] = {}
    for module, layer in layers.items():
        group = layer.fused_group or module
        largest[group] = max(largest.get(group, 0.0), calibration.amax[module])
    return {
        module: np.float32(largest[layer.fused_group or module]) / np.float32(E4M3_MAX)
        for module, layer in layers.items()
    }
