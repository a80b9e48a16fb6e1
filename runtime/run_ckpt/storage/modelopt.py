"""ModelOpt's backbone.pt: the largest input of each layer, as its calibration saw it."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.extras import naming_extras

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
        # ModelOpt's state may name slice, which does nothing by itself.
        with torch.serialization.safe_globals([slice]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except faults as error:
        raise CheckpointError(
            f"{path.name}: not a file of tensors: damaged, or a pickle with code in it, which is never run"
            f" ({type(error).__name__}). Save it again with ModelOpt's mto.save()."
        ) from error


def _read_range(path: Path, name: str, state: Mapping[str, Any]) -> ModelOptRange:
    amax, weight = state[name], state.get(name.removesuffix(AMAX) + _WEIGHT)
    if amax.numel() != 1:
        raise CheckpointError(
            f"{path.name}: {name} is {list(amax.shape)}: only one scale for all of an input can be stored."
            " Calibrate with ModelOpt's FP8_DEFAULT_CFG."
        )
    return ModelOptRange(float(amax), None if weight is None else weight.shape[-1])
