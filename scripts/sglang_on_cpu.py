"""Unmodified SGLang 0.5.23 on a CPU, as far as a transformer ready for its first request.

The GPU is an EMULATION. A Persona replaces the answers to "which GPU is this" where loading asks for them,
the one FP8 cast that SGLang does in a GPU kernel, and Tensor.cuda(). Ranks are emulated too: SGLang's tensor
parallel group is told its size and rank. ServerArgs, TransformerLoader, model construction, name mapping, loading and
process_weights_after_loading are SGLang's own, and so is the way in which it finds plug-ins. Two packages
that do not load on a CPU are filled in: torchvision's operators, torchaudio.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from missing_libraries import fill_in_torchaudio, fill_in_torchvision

# A registered model of each class: SGLang takes the pipeline's configuration from its name.
MODEL_IDS = {
    "ZImageTransformer2DModel": "Z-Image-Turbo",
    "FluxTransformer2DModel": "FLUX.1-dev",
    "Flux2Transformer2DModel": "FLUX.2-dev",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "WanTransformer3DModel": "Wan2.2-T2V-A14B-Diffusers",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "CosmosTransformer3DModel": "Anima-Base-v1.0-Diffusers",
}
WAN_IMAGE_TO_VIDEO = "Wan2.1-I2V-14B-480P-Diffusers"

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
    "b200": Persona(is_cuda=True, is_rocm=False, has_cutlass_fp8=True, is_fnuz=False, capability=(10, 0)),
    "mi300x": Persona(is_cuda=False, is_rocm=True, has_cutlass_fp8=False, is_fnuz=True, capability=(9, 4)),
    "mi355x": Persona(is_cuda=False, is_rocm=True, has_cutlass_fp8=False, is_fnuz=False, capability=(9, 5)),
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


class SGLang:
    """SGLang in this process, with its plug-ins, made ready once for one class of model."""

    def __init__(self, folder: Path, persona: Persona | None, *, plugins: bool = True):
        """folder: a checkpoint of the class; persona: None for the CPU itself; plugins: False leaves out all."""
        fill_in_torchvision()
        fill_in_torchaudio()
        os.environ["SGLANG_DIFFUSION_PLATFORM_OVERRIDE"] = "cpu"
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        if not plugins:
            os.environ["SGLANG_PLUGINS"] = "none of them"
        from sglang.multimodal_gen.registry import _get_config_info
        from sglang.multimodal_gen.runtime.distributed import parallel_state
        from sglang.multimodal_gen.runtime.loader import fsdp_load
        from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
        from sglang.multimodal_gen.runtime.platforms.plugins import apply_plugin_hooks
        from sglang.multimodal_gen.runtime.server_args import server_args as server

        info = _get_config_info("unused", model_id=_model_id(folder))
        self._empty = tempfile.TemporaryDirectory()
        self._arguments = server.ServerArgs(
            model_path=self._empty.name,
            pipeline_config=info.pipeline_config_cls(),
            log_level="warning",
        )
        server.set_global_server_args(self._arguments)
        parallel_state.maybe_init_distributed_environment_and_model_parallel(
            1, 1, distributed_init_method=f"file://{self._empty.name}/rendezvous"
        )
        model_class = json.loads((folder / "config.json").read_text())["_class_name"]
        ModelRegistry.resolve_model_cls(model_class)  # its imports must not meet the persona
        if persona:
            _emulate(persona)

        # Looks on: which names the new model has, and how SGLang maps a checkpoint's names to them.
        self._seen: dict[str, Any] = {}
        load_state = fsdp_load.load_model_from_full_model_state_dict

        def observe(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._seen.update(expected=set(model.state_dict()), mapping=kwargs["param_names_mapping"])
            return load_state(model, *args, **kwargs)

        fsdp_load.load_model_from_full_model_state_dict = observe
        apply_plugin_hooks()

    def load(self, folder: Path, rank: int = 0, n_ranks: int = 1, component: str = "transformer") -> Loaded:
        """Return the model as this rank holds it. Raises what SGLang raises. component: the pipeline's name for it."""
        from sglang.multimodal_gen.runtime.distributed import parallel_state
        from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import ComponentLoader

        group = parallel_state.get_tp_group()
        group.world_size, group.rank_in_group = n_ranks, rank
        self._arguments.component_paths[component] = str(folder.resolve())
        loader = ComponentLoader.for_component_type(component, "diffusers")
        model = loader.load_customized(str(folder.resolve()), self._arguments, component)
        return _describe(model, **self._seen)

    def load_encoder(self, folder: Path, component: str, *, natively: bool = False) -> torch.nn.Module:
        """Return a pipeline's text encoder as --model-path loads it. natively: by transformers, whatever it is."""
        from sglang.multimodal_gen.runtime.loader.component_loaders.component_loader import ComponentLoader

        path = str(folder.resolve())
        self._arguments.pipeline_config = type(self._arguments.pipeline_config)()  # each load writes into it
        self._arguments.component_paths[component] = path
        loader = ComponentLoader.for_component_type(component, "transformers")
        if natively:
            return loader.load_native(path, self._arguments, "transformers", component)
        return loader.load(path, self._arguments, component, "transformers")[0]


def _describe(model: torch.nn.Module, expected: set[str], mapping: Callable[[str], Any]) -> Loaded:
    from sglang.multimodal_gen.runtime.loader import fsdp_load

    def to_runtime(tensors: Tensors) -> Tensors:
        items: Iterator[tuple[str, torch.Tensor]] = iter(tensors.items())
        preprocess = getattr(model, "preprocess_loaded_state_dict", None)
        if preprocess is not None:
            items = preprocess(items)
        return fsdp_load.hf_to_custom_state_dict(items, mapping, valid_target_names=expected)[0]

    def to_name(name: str) -> str:
        target = mapping(name)[0]
        return name if target not in expected and name in expected else target

    return Loaded(model, expected, to_runtime, to_name)


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
    # The scales of NVFP4 are sent to the GPU as they are put in order.
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
