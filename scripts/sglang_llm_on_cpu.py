"""SGLang 0.5.23's language side on a CPU, as far as a model ready for its first request.

ServerArgs, ModelConfig with its reading of quantization_config, the model class, DefaultModelLoader and the model's
load_weights are SGLang's own, and so is process_weights_after_loading where no kernel for GPUs is called. STAND-INS:
the device's capability is that of an H100, the rounding of FP8 and AITER's order of scales are torch, DeepSeek's rotary
embedding is the one of GPUs, MXFP4 is among the methods as it is on GPUs, and a kernel of vLLM's that no loading calls
is an empty name. SGLang sees neither CUDA nor ROCm: what a layer's kernel decides there was not run.
"""

import logging
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_ONE_RANK = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_H100 = (9, 0)
# The ranks' groups are made by it too.
_RENDEZVOUS = tempfile.TemporaryDirectory()


def prepare() -> None:
    """Import SGLang and put the stand-ins in place."""
    os.environ |= _ONE_RANK
    logging.disable(logging.WARNING)
    _fill_in_vllm()
    torch.cuda.get_device_capability = lambda device=None: _H100
    from sglang.srt import utils
    from sglang.srt.utils import common

    utils.get_device_capability = common.get_device_capability = lambda device_id=0: _H100
    from sglang.kernels.ops.quantization import fp8_kernel
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.models import registry  # noqa: F401  (all classes)

    quantization.QUANTIZATION_METHODS["mxfp4"] = quantization.BASE_QUANTIZATION_METHODS["mxfp4"] = Mxfp4Config
    factory.get_rope_cpu = lambda *arguments: factory.get_rope(*arguments[:8])
    fp8_kernel.sgl_per_tensor_quant_fp8 = _round_to_fp8


def load(folder: Path, see_loaded: Callable[[nn.Module], None]) -> nn.Module:
    """Return the model; ``see_loaded`` is called with it before process_weights_after_loading.

    Raises what SGLang raises.
    """
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention_flags
    from sglang.srt.model_loader import get_model
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(
        model_path=str(folder), skip_tokenizer_init=True, device="cpu", dtype="bfloat16", log_level="error"
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    config = ModelConfig.from_server_args(arguments)
    if not parallel_state.model_parallel_is_initialized():
        where = f"file://{_RENDEZVOUS.name}/ranks"
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=where, backend="gloo"
        )
        parallel_state.initialize_model_parallel()
    initialize_dp_attention_flags(arguments)

    def see_then_process(model: nn.Module, device: torch.device) -> None:
        see_loaded(model)
        process(model, device)

    process = DefaultModelLoader.postprocess_weights
    DefaultModelLoader.postprocess_weights = staticmethod(see_then_process)
    try:
        return get_model(
            model_config=config, load_config=LoadConfig(), device_config=DeviceConfig(device="cpu", gpu_id=0)
        )
    finally:
        DefaultModelLoader.postprocess_weights = staticmethod(process)


def _fill_in_vllm() -> None:
    """SGLang takes a kernel from vLLM where it finds no GPU; loading does not call it."""
    package, kernels = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    package.__path__, kernels.rotary_embedding = [], None
    sys.modules |= {"vllm": package, "vllm._custom_ops": kernels}


def _round_to_fp8(value: torch.Tensor, output: torch.Tensor, scale: torch.Tensor, is_static: bool) -> None:
    largest = torch.finfo(torch.float8_e4m3fn).max
    assert is_static
    output.copy_(torch.clamp(value.float() / scale, -largest, largest).to(torch.float8_e4m3fn))
