"""The story of loading: manifest, model on the meta device, replace, fill, hand over to a backend."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from run_ckpt.backends.choose import check_activations
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.loading.checkpoint import open_to_load
from run_ckpt.loading.experts import separate_experts
from run_ckpt.loading.fill import DTYPES, Slot, fill_slots, match_slots, parameter_slots
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.loading.renamed import renamed_for
from run_ckpt.loading.replace import replace_linears
from run_ckpt.progress import Progress, Silent
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.snapshots import local_path

_logger = logging.getLogger(__name__)


def load_quantized(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    activations: str | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the model of the converted component in folder ``path``, its quantized linears in place, in eval mode.

    path: owner/name[@revision] or hf://owner/name[@revision][/folder] fetches it from the Hub, into the Hub's cache.
    model: any module with matching names, best on the meta device; its tensors are replaced. Default:
    the diffusers or transformers class that config.json names.
    dtype: what floating tensors that are not quantized become; default: as stored. Those which the class keeps in
    float32 become that, as in from_pretrained. backend: one of run_ckpt.backends.choose, default: the first that runs.
    activations: what the inputs of quantized layers are multiplied in, "bf16" (as they come), "fp8" (by token),
    "mxfp8", "nvfp4" or "mxfp4"; default: the backend's own. Layers in 8 bits never take those of 4.

    Shards are read straight to a GPU, and mapped for the CPU as safetensors does: don't overwrite them
    in place while the model lives. A quantized weight is decoded by nothing but its backend.
    Nothing is filled in, cast or left out silently: raises CheckpointError (FaultsError with every
    fault, ManifestError, BackendError), which names the tensor, the file and the remedy.
    """
    path, device, started = local_path(path), torch.device(device), time.perf_counter()
    with open_to_load(path) as checkpoint:
        check_activations(activations)
        model = _build_model(path) if model is None else model
        checkpoint = renamed_for(model, checkpoint)
        separate_experts(model, _linears(checkpoint))
        linears = replace_linears(model, checkpoint.manifest.layers, backend, activations)
        matched = _match(checkpoint, model)
        dtypes = _dtypes(checkpoint, model, matched, dtype)
        fill_slots(checkpoint.reader, matched, device, dtypes, progress or Silent())
    for name, linear in linears.items():
        linear.dtype = _dtype_in(model, f"{name}.weight", dtype or DTYPES[linear.layer.source_dtype])
        linear.prepare(device)
    _finish(model, device)
    if checkpoint.manifest.folds:
        _logger.warning(
            "%s: the inputs of some layers were smoothed (--fold): a LoRA that was trained on the source does not fit."
            " Train it on this model, or convert without --fold.",
            path,
        )
    _logger.info("loaded %s: %s, %.1f s", path, describe_backends(linears.values()), time.perf_counter() - started)
    return model


def describe_backends(linears: Iterable[QuantizedLinear]) -> str:
    """Return how many layers of which format went to which backend with which activations, for people."""
    counts = Counter((linear.layer.format.name, _backend(linear)) for linear in linears)
    return ", ".join(f"{count} {format_} layers on {backend}" for (format_, backend), count in sorted(counts.items()))


def _backend(linear: QuantizedLinear) -> str:
    return f"{linear.backend} ({linear.activations} activations)" if linear.backend else "no backend yet"


def _build_model(path: Path) -> nn.Module:
    from run_ckpt.loading.build import build_model

    model: nn.Module = build_model(path)
    return model


def _linears(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the modules of all weights, quantized or not."""
    yield from checkpoint.manifest.layers
    yield from (name.removesuffix(".weight") for name in checkpoint.manifest.kept)


def _match(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Slot]:
    specs = {spec.name: spec for spec in checkpoint.reader.specs()}
    # What repeats scales for consumers that fuse layers, or scales activations elsewhere, is no tensor of the model.
    aside = checkpoint.manifest.fused_scales.keys() | checkpoint.unused
    wanted = {name: spec for name, spec in specs.items() if name not in aside}
    matched, faults = match_slots(parameter_slots(model), wanted, _coded(checkpoint))
    if faults:
        raise FaultsError(f"{checkpoint.path}: does not fit {type(model).__name__}", faults)
    return {name: matched[name] for name in wanted}


def _coded(checkpoint: Checkpoint) -> set[str]:
    return {name for layer in checkpoint.manifest.layers.values() for name in layer.tensors.values()}


def _dtypes(
    checkpoint: Checkpoint, model: nn.Module, matched: dict[str, Slot], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Tensor name -> the dtype it is given, where that may not be the stored one."""
    layers = checkpoint.manifest.layers.values()
    specs = checkpoint.manifest.specs()
    # Other tools may store a float scale in 16 bits.
    dtypes = {spec.name: torch.float32 for layer in layers for spec in layer.specs().values() if spec.dtype == "F32"}
    for name in matched.keys() - _coded(checkpoint):
        stored = DTYPES[specs[name].dtype]
        if stored.is_floating_point:
            dtypes[name] = _dtype_in(model, name, dtype or stored)
    return dtypes


def _dtype_in(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return what becomes of tensor ``name`` of a model that is loaded as ``dtype``."""
    # Whole parts of the name: "norm1" is none of "norm10.weight".
    in_float32 = any(f".{part}." in f".{name}." for part in _float32_parts(model, dtype))
    return torch.float32 if in_float32 else dtype


def _float32_parts(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the parts of names whose tensors from_pretrained makes float32 where the others become ``dtype``.

    diffusers: _keep_in_fp32_modules, always (models/model_loading_utils.py). transformers: these for float16 only,
    and _keep_in_fp32_modules_strict for bfloat16 too (PreTrainedModel._get_dtype_plan).
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    parts = {kept} if isinstance(kept, str) else set(kept)
    if not hasattr(model, "_keep_in_fp32_modules_strict"):
        return parts
    strict = set(model._keep_in_fp32_modules_strict or ())  # type: ignore[arg-type]
    return {torch.float16: parts | strict, torch.bfloat16: strict}.get(dtype, set())


def _finish(model: nn.Module, device: torch.device) -> None:
    empty = []
    for path, module in model.named_modules():
        for leaf, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and tensor.is_meta:
                empty.append(f"{path}.{leaf}" if path else leaf)
            elif leaf in module._buffers and tensor is not None and tensor.device != device:
                # One that no checkpoint holds; the others are there.
                module._buffers[leaf] = tensor.to(device)
    if empty:
        raise CheckpointError(
            f"{type(model).__name__}: {', '.join(empty)} are on the meta device and not stored in a checkpoint."
            " Build it under accelerate.init_empty_weights(include_buffers=False), which leaves such buffers real."
        )
    model.requires_grad_(False).eval()
