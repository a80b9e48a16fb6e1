"""Load a converted transformer in unmodified SGLang 0.5.23 on a CPU and compare every weight with its BF16 source.

SGLang reports little that is wrong with a checkpoint: a missing scale becomes 1.0, a key it does not know is
a line in a log. So this runs SGLang's own ServerArgs, TransformerLoader, name mapping, loading and
process_weights_after_loading, decodes what the model then holds, and compares it with the source. Fused
linears are compared as SGLang fuses them. Prints one line per linear and a verdict; exit 1 on a defect.

    scripts/setup_sglang.sh DIR
    DIR/bin/python scripts/check_sglang.py CONVERTED BF16 [--persona h100|mi300x]

The GPU is an EMULATION. ``--persona`` replaces the answers to "which GPU is this" where loading asks for them
(see Persona) and the one FP8 cast that SGLang does in a GPU kernel. Model construction, loading and
post-load processing are SGLang's own; no matrix is multiplied, so this says nothing about speed, kernels
or activations. Two packages that do not load on a CPU are filled in: torchvision's operators, torchaudio.

SGLang reads Z-Image's sizes under names of its own. A Z-Image in other than the published size needs
num_layers, num_attention_heads and out_channels beside n_layers, n_heads and in_channels in both config.json.
"""

import argparse
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# A registered model of each class: SGLang takes the pipeline's configuration from its name.
MODEL_IDS = {
    "ZImageTransformer2DModel": "Z-Image-Turbo",
    "FluxTransformer2DModel": "FLUX.1-dev",
    "Flux2Transformer2DModel": "FLUX.2-dev",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "WanTransformer3DModel": "Wan2.2-T2V-A14B-Diffusers",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "LTX2VideoTransformer3DModel": "LTX-2",
}
WAN_IMAGE_TO_VIDEO = "Wan2.1-I2V-14B-480P-Diffusers"

# Rounding to e4m3 with one scale per tensor or block costs 0.026 of a matrix of normal numbers.
MAX_QUANTIZATION_ERROR = 0.032
# What loading may add to that: MI300X requantizes fused linears through FP16.
MAX_LOADING_ERROR = 1e-3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Persona:
    """What an emulated GPU answers while a checkpoint is loaded."""

    is_cuda: bool
    is_rocm: bool
    has_cutlass_fp8: bool
    is_fnuz: bool
    capability: tuple[int, int]


PERSONAS = {
    "h100": Persona(is_cuda=True, is_rocm=False, has_cutlass_fp8=True, is_fnuz=False, capability=(9, 0)),
    "mi300x": Persona(is_cuda=False, is_rocm=True, has_cutlass_fp8=False, is_fnuz=True, capability=(9, 4)),
}


@dataclass
class Loaded:
    """A model that SGLang loaded. ``expected`` are the names in its state before loading.

    ``to_runtime`` maps a checkpoint to the model's names, fusing as SGLang fuses, ``to_name`` one name.
    """

    model: torch.nn.Module
    expected: set[str]
    to_runtime: Callable[[Tensors], Tensors]
    to_name: Callable[[str], str]


@dataclass
class Report:
    """Lines for each linear, what is wrong, and what is worth knowing but not wrong."""

    lines: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    worst: float = 0.0


def main() -> int:
    """Print the report; return 1 where SGLang holds something else than the source says."""
    parser = argparse.ArgumentParser(description="Compare what SGLang loads from CONVERTED with BF16.")
    parser.add_argument("converted", type=Path, help="the converter's output, with config.json")
    parser.add_argument("bf16", type=Path, help="the folder it was made from")
    parser.add_argument("--persona", choices=PERSONAS, default="h100", help="GPU to emulate (default: h100)")
    parser.add_argument("--quiet", action="store_true", help="print defects and the verdict alone")
    arguments = parser.parse_args()
    config_bytes = (arguments.converted / "config.json").read_bytes()
    try:
        loaded = load_in_sglang(arguments.converted, PERSONAS[arguments.persona])
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"REFUSED ({arguments.persona}): {type(error).__name__}: {error}")
        return 1
    report = compare(loaded, read_tensors(arguments.converted), read_tensors(arguments.bf16))
    if (arguments.converted / "config.json").read_bytes() != config_bytes:
        report.defects.append("config.json: SGLang rewrote it in place")
    for line in [] if arguments.quiet else [*report.lines, *report.notes]:
        print(line)
    for defect in report.defects:
        print(f"DEFECT {defect}")
    verdict = f"WRONG, {len(report.defects)} defects" if report.defects else "RIGHT"
    print(f"{verdict} ({arguments.persona}, emulated): {len(report.lines)} linears, worst error {report.worst:.4f}")
    return 1 if report.defects else 0


def read_tensors(folder: Path) -> Tensors:
    """Return all tensors of a folder: those of the index where there is one, else of every shard."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        shards = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


# Comparing


def compare(loaded: Loaded, converted: Tensors, source: Tensors) -> Report:
    """Compare every parameter that SGLang holds with the source, and FP8 ones with the converted file too."""
    report = Report()
    held = loaded.to_runtime(converted)
    wanted = loaded.to_runtime(source)
    stored = loaded.to_runtime(decode_stored(converted))
    _compare_keys(report, loaded, held, wanted)
    seen = set()
    for module_name, module in loaded.model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if name.rpartition(".")[2] in ("weight_scale", "weight_scale_inv"):
                continue
            if name.endswith(".input_scale"):
                _compare_input_scale(report, name, parameter, converted, loaded)
                continue
            seen.add(name)
            if name not in wanted:
                report.defects.append(f"{name}: the source has no such weight")
            elif parameter.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
                _compare_fp8(report, name, module, wanted[name], stored[name])
            else:
                is_linear = parameter.ndim == 2 and name.endswith(".weight")
                is_fp8_on_disk = held[name].dtype == torch.float8_e4m3fn
                _compare_plain(report, name, parameter, wanted[name], is_linear=is_linear, dequantized=is_fp8_on_disk)
    seen |= {name for name, _ in loaded.model.named_buffers()}
    report.defects += [f"{name}: no parameter of the model holds this tensor" for name in sorted(wanted.keys() - seen)]
    return report


def decode_stored(converted: Tensors) -> Tensors:
    """Return the converted file's tensors under the source's names, FP8 weights as float32."""
    decoded = {}
    for name, tensor in converted.items():
        if tensor.dtype == torch.float8_e4m3fn:
            module = name.removesuffix(".weight")
            scale = converted.get(f"{module}.weight_scale", converted.get(f"{module}.weight_scale_inv"))
            # Without a scale SGLang takes 1.0; the missing key is reported elsewhere.
            decoded[name] = decode(tensor, torch.ones(1) if scale is None else scale)
        elif not name.endswith(("_scale", "_scale_inv")):
            decoded[name] = tensor
    return decoded


def decode(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 [N, K] that FP8 codes [N, K] stand for.

    scale: one value, one per row [N, 1], or one per block of 128 x 128.
    """
    N, K = weight.shape
    scale = scale.float()
    if scale.ndim == 2 and scale.shape != (N, 1):
        scale = scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    return weight.float() * scale


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.float()
    return float((value.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _compare_keys(report: Report, loaded: Loaded, held: Tensors, wanted: Tensors) -> None:
    report.notes += [f"unexpected key, ignored by SGLang: {name}" for name in sorted(held.keys() - loaded.expected)]
    for name in sorted(loaded.expected - held.keys()):
        # A buffer that no checkpoint holds (rope tables) is no defect, a scale that SGLang makes up is.
        if "scale" in name.rpartition(".")[2] and name not in wanted:
            report.defects.append(f"{name}: missing, SGLang filled in 1.0")
        elif name in wanted:
            report.defects.append(f"{name}: missing in the converted folder")
        else:
            report.notes.append(f"missing key, also in the source: {name}")


def _compare_fp8(
    report: Report, name: str, module: torch.nn.Module, wanted: torch.Tensor, stored: torch.Tensor
) -> None:
    if hasattr(module, "weight_scale_inv"):
        value = decode(module.weight, module.weight_scale_inv)
    else:
        value = decode(module.weight.t(), module.weight_scale)  # SGLang transposes per-tensor weights
    error, added = relative_error(value, wanted), relative_error(value, stored)
    report.worst = max(report.worst, error)
    report.lines.append(f"{name}  {module.weight.dtype}  error {error:.4f}  added by loading {added:.1e}")
    if not (error <= MAX_QUANTIZATION_ERROR and added <= MAX_LOADING_ERROR):
        report.defects.append(f"{name}: off by {error:.4g} from the source, {added:.4g} from the converted file")


def _compare_plain(
    report: Report, name: str, value: torch.Tensor, wanted: torch.Tensor, *, is_linear: bool, dequantized: bool
) -> None:
    same_shape = value.shape == wanted.shape
    exact = same_shape and torch.equal(value.float(), wanted.to(value.dtype).float())
    error = 0.0 if exact else relative_error(value, wanted) if same_shape else float("inf")
    report.worst = max(report.worst, error)
    if is_linear:
        report.lines.append(f"{name}  {value.dtype}  error {error:.4f}")
    if dequantized and error <= MAX_QUANTIZATION_ERROR:
        report.notes.append(f"{name}: FP8 on disk, but SGLang holds it in {value.dtype}: right, no saving")
    elif not exact:
        report.defects.append(f"{name}: {value.dtype}, off by {error:.4g} from the source and should be equal")


def _compare_input_scale(report: Report, name: str, value: torch.Tensor, converted: Tensors, loaded: Loaded) -> None:
    """The largest of the fused members' scales, or twice that where the codes are e4m3fnuz."""
    module = name.removesuffix(".input_scale")
    members = [
        tensor
        for key, tensor in converted.items()
        if key.endswith(".input_scale")
        and loaded.to_name(f"{key.removesuffix('.input_scale')}.weight") == f"{module}.weight"
    ]
    if not members:  # then it is reported as missing
        return
    is_fnuz = loaded.model.get_parameter(f"{module}.weight").dtype == torch.float8_e4m3fnuz
    wanted = max(float(tensor.max()) for tensor in members) * (2 if is_fnuz else 1)
    if float(value) != wanted:
        report.defects.append(f"{name}: {float(value):.6g}, should be {wanted:.6g}")


# Loading


def load_in_sglang(folder: Path, persona: Persona) -> Loaded:
    """Return the model as SGLang holds it, ready for its first request. Raises what SGLang raises."""
    _fill_in_torchvision()
    _fill_in_torchaudio()
    os.environ["SGLANG_DIFFUSION_PLATFORM_OVERRIDE"] = "cpu"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    from sglang.multimodal_gen.registry import _get_config_info
    from sglang.multimodal_gen.runtime.distributed import parallel_state
    from sglang.multimodal_gen.runtime.loader import fsdp_load
    from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import ComponentLoader
    from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
    from sglang.multimodal_gen.runtime.server_args import server_args as server

    info = _get_config_info("unused", model_id=_model_id(folder))
    with tempfile.TemporaryDirectory() as empty:
        arguments = server.ServerArgs(
            model_path=empty,
            pipeline_config=info.pipeline_config_cls(),
            component_paths={"transformer": str(folder.resolve())},
            log_level="warning",
        )
        server.set_global_server_args(arguments)
        parallel_state.maybe_init_distributed_environment_and_model_parallel(
            1, 1, distributed_init_method=f"file://{empty}/rendezvous"
        )
        model_class = json.loads((folder / "config.json").read_text())["_class_name"]
        ModelRegistry.resolve_model_cls(model_class)  # its imports must not meet the persona
        _emulate(persona)

        # Looks on: which names the new model has, and how SGLang maps a checkpoint's names to them.
        seen: dict[str, Any] = {}
        load_state = fsdp_load.load_model_from_full_model_state_dict

        def observe(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.update(expected=set(model.state_dict()), mapping=kwargs["param_names_mapping"])
            return load_state(model, *args, **kwargs)

        fsdp_load.load_model_from_full_model_state_dict = observe
        loader = ComponentLoader.for_component_type("transformer", "diffusers")
        model = loader.load_customized(str(folder.resolve()), arguments, "transformer")

    def to_runtime(tensors: Tensors) -> Tensors:
        items: Iterator[tuple[str, torch.Tensor]] = iter(tensors.items())
        preprocess = getattr(model, "preprocess_loaded_state_dict", None)
        if preprocess is not None:
            items = preprocess(items)
        return fsdp_load.hf_to_custom_state_dict(items, seen["mapping"], valid_target_names=seen["expected"])[0]

    def to_name(name: str) -> str:
        target = seen["mapping"](name)[0]
        return name if target not in seen["expected"] and name in seen["expected"] else target

    return Loaded(model, seen["expected"], to_runtime, to_name)


def _model_id(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    class_name = config["_class_name"]
    if class_name not in MODEL_IDS:
        sys.exit(f"{class_name}: no model of this class is known here. Known: {', '.join(MODEL_IDS)}.")
    if class_name == "WanTransformer3DModel" and config.get("image_dim"):
        return WAN_IMAGE_TO_VIDEO
    return MODEL_IDS[class_name]


def _emulate(persona: Persona) -> None:
    """Give the persona's answers wherever SGLang's loading asks which GPU this is (0.5.23)."""
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.multimodal_gen.runtime.layers.quantization import fp8, modelopt_quant
    from sglang.multimodal_gen.runtime.platforms import current_platform
    from sglang.multimodal_gen.runtime.platforms.interface import DeviceCapability
    from sglang.srt.layers.quantization import utils

    platform = type(current_platform)
    platform.is_cpu = classmethod(lambda cls: False)
    platform.is_cuda = classmethod(lambda cls: persona.is_cuda)
    platform.is_rocm = platform.is_hip = classmethod(lambda cls: persona.is_rocm)
    platform.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*persona.capability))
    fp8._is_cpu, fp8._is_cuda, fp8._is_hip = False, persona.is_cuda, persona.is_rocm
    fp8._is_fp8_fnuz = persona.is_fnuz
    fp8.can_auto_enable_marlin_fp8 = lambda: False  # only for GPUs older than FP8
    fp8.cutlass_fp8_supported = modelopt_quant.cutlass_fp8_supported = lambda: persona.has_cutlass_fp8
    fp8_kernel.is_fp8_fnuz = modelopt_quant.is_fp8_fnuz = lambda: persona.is_fnuz
    fp8_dtype, fp8_max = (torch.float8_e4m3fnuz, 224.0) if persona.is_fnuz else (torch.float8_e4m3fn, 448.0)

    def scaled_fp8_quant(tensor: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As fp8_kernel._native_static_quant_fp8; CUDA has a kernel for it."""
        return torch.clamp(tensor.float() / scale, -fp8_max, fp8_max).to(fp8_dtype), scale

    utils.scaled_fp8_quant = scaled_fp8_quant


def _fill_in_torchvision() -> None:
    """Declare the operators whose library does not load beside a CPU build of torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT_ALIVE.append(library)


_KEPT_ALIVE: list[object] = []


def _fill_in_torchaudio() -> None:
    """Put an empty torchaudio in place: it is imported, and never used to load a transformer."""

    class Stub(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return Stub(f"{self.__name__}.{name}")

    stub = Stub("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None, is_package=True)
    sys.modules["torchaudio"] = stub


if __name__ == "__main__":
    sys.exit(main())
