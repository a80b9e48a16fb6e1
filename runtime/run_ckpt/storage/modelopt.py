"""ModelOpt's backbone.pt: the largest input of each layer, as its calibration saw it."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.extras import naming_extras
from run_ckpt.storage.files import MAX_TEXT_NBYTES, open_to_read

MODELOPT_SUFFIXES = (".pt", ".pth")
AMAX = ".input_quantizer._amax"
_WEIGHT = ".weight"


@dataclass(frozen=True)
class ModelOptRange:
    """The largest |input| of a layer, and its weight's K, None where the file holds no weight of it."""

    amax: float
    K: int | None


def read_modelopt_ranges(path: Path) -> dict[str, ModelOptRange]:
    """Return module -> range of every layer whose input ModelOpt quantizes with one static scale.

    path: what modelopt.torch.opt.save() wrote: {"modelopt_state", "model_state_dict"}, where a quantized layer has
    ``<layer>.input_quantizer._amax``. It is a pickle, and read so that no code in it can run; weights are not read.
    Raises CheckpointError where it is damaged, holds code or no ranges; MissingPackageError without torch.
    """
    saved = _load(path)
    state = saved.get("model_state_dict") if isinstance(saved, dict) else None
    tensors: Mapping[Any, Any] = state if isinstance(state, Mapping) else {}
    ranges = {
        name.removesuffix(AMAX): _read_range(path, name, tensors)
        for name in tensors
        if isinstance(name, str) and name.endswith(AMAX)
    }
    if not ranges:
        raise CheckpointError(
            f"{path.name}: holds no <layer>{AMAX}. Give what ModelOpt's mto.save() wrote after calibrating for FP8."
        )
    return ranges


@naming_extras("A calibration of ModelOpt")
def _load(path: Path) -> Any:
    import torch

    # What a damaged pickle makes the reader trip over.
    faults = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)
    try:
        _check_sizes(path)
        # ModelOpt's state may name slice, which does nothing by itself.
        with torch.serialization.safe_globals([slice]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*faults, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path.name}: not a file of tensors: damaged, or a pickle with code in it, which is never run"
            f" ({type(error).__name__}). Save it again with ModelOpt's mto.save()."
        ) from error


def _check_sizes(path: Path) -> None:
    """Raise ValueError for a file whose pickle would unfold to something much larger, OSError for no file at all."""
    with open(open_to_read(path), "rb") as file, zipfile.ZipFile(file) as saved:
        for entry in saved.infolist():
            is_large = entry.filename.endswith(".pkl") and entry.file_size > MAX_TEXT_NBYTES
            if entry.compress_type != zipfile.ZIP_STORED or is_large:
                raise ValueError(f"{entry.filename}: compressed, or over {MAX_TEXT_NBYTES:,} bytes")


def _read_range(path: Path, name: str, state: Mapping[str, Any]) -> ModelOptRange:
    amax, weight = state[name], state.get(name.removesuffix(AMAX) + _WEIGHT)
    try:
        if amax.numel() == 1:
            return ModelOptRange(float(amax), None if weight is None else weight.shape[-1])
        what = str(list(amax.shape))
    except (AttributeError, LookupError, RuntimeError):  # of tensors that are none, or not here
        what = f"no number, or its {_WEIGHT[1:]} no matrix"
    raise CheckpointError(
        f"{path.name}: {name} is {what}: only one scale for all of an input can be stored."
        " Calibrate with ModelOpt's FP8_DEFAULT_CFG."
    )
