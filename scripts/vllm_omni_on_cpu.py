"""Unmodified vLLM-Omni 0.30.0 on a CPU, as far as a transformer ready for its first request.

The GPU is an EMULATION: what vLLM-Omni's platform answers is replaced, and so are the components of a pipeline that are
no transformer (tokenizer, text encoder, VAE, scheduler). OmniDiffusionConfig's reading of config.json, the pipeline's
construction of its transformer, DiffusersPipelineLoader with its adapters, the model's load_weights and
process_weights_after_loading are vLLM-Omni's own, and so is the way in which it finds plug-ins. Ranks are emulated
too: vLLM's tensor parallel group is told its size and rank.
"""

import functools
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from missing_libraries import fill_in_torchaudio, fill_in_torchvision
from torch import nn
from vllm_ranks import as_rank
from vllm_stand_ins import stand_in_for_block_kernel, stand_in_for_fp8_rounding

# Class of a transformer -> the pipeline whose folder it lies in.
PIPELINES = {
    "ZImageTransformer2DModel": "ZImagePipeline",
    "FluxTransformer2DModel": "FluxPipeline",
    "Flux2Transformer2DModel": "Flux2Pipeline",
    "QwenImageTransformer2DModel": "QwenImagePipeline",
    "WanTransformer3DModel": "WanPipeline",
    "LTX2VideoTransformer3DModel": "LTX2Pipeline",
    "WanVACETransformer3DModel": "WanVACEPipeline",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo15ImageToVideoPipeline",
}
# Where the config tells which of a class's pipelines: class, what is true of it -> pipeline.
OTHER_PIPELINES = {
    ("WanTransformer3DModel", "image_dim"): "WanImageToVideoPipeline",
    ("QwenImageTransformer2DModel", "use_layer3d_rope"): "QwenImageLayeredPipeline",
}
_OTHER_COMPONENTS = re.compile(
    r"(Scheduler|Tokenizer\w*|Encoder\w*|AutoConfig|Processor|ForConditionalGeneration|CLIPTextModel|AutoModel\w*"
    r"|from_pretrained_with_prefetch|prefetch_subfolders|create_transformers_model|Vocoder\w*|Connectors\w*)$"
    r"|Autoencoder"
)


class StandIn(MagicMock):
    """Answers everything, and is larger than nothing."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.__gt__ = lambda self, other: False


@dataclass
class Loaded:
    """A transformer that vLLM-Omni loaded, and the config that it made of config.json's quantization_config."""

    model: nn.Module
    quant_config: Any
    process: Any

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the linears that have a quantization method of their own, by name."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        for name, module in self.model.named_modules():
            if isinstance(module, LinearBase) and not isinstance(module.quant_method, UnquantizedLinearMethod):
                yield name, module


class VllmOmni:
    """vLLM-Omni in this process, with its plug-ins."""

    def __init__(self, *, plugins: bool = True):
        """plugins: False leaves out all."""
        fill_in_torchvision()
        fill_in_torchaudio()
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not plugins:
            os.environ["VLLM_PLUGINS"] = "none of them"
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm_omni.diffusion.distributed import parallel_state
        from vllm_omni.plugins import load_omni_general_plugins

        logging.getLogger("vllm_omni").setLevel(logging.ERROR)
        _emulate()
        load_omni_general_plugins()
        self._folder = tempfile.TemporaryDirectory()
        self._config = VllmConfig()
        self._config.model_config = StandIn(dtype=torch.bfloat16)
        with set_current_vllm_config(self._config):
            parallel_state.init_distributed_environment(
                world_size=1,
                rank=0,
                local_rank=0,
                distributed_init_method=f"file://{self._folder.name}/rendezvous",
                backend="gloo",
            )
            parallel_state.initialize_model_parallel()

    def load(self, folder: Path, rank: int = 0, n_ranks: int = 1) -> Loaded:
        """Return the transformer of ``folder`` as this rank holds it, before process_weights_after_loading.

        Raises what vLLM-Omni raises.
        """
        from vllm.config import set_current_vllm_config
        from vllm.config.load import LoadConfig
        from vllm_omni.diffusion import registry
        from vllm_omni.diffusion.data import OmniDiffusionConfig
        from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

        with (
            tempfile.TemporaryDirectory() as pipeline,
            set_current_vllm_config(self._config),
            _default_dtype(),
            as_rank(rank, n_ranks),
        ):
            _lay_out(Path(pipeline), folder)
            config = OmniDiffusionConfig(model=pipeline)
            # A dataclass field whose default only vLLM-Omni's own start resolves.
            config.extras = {}
            config.enrich_config()
            pipeline_class = registry.DiffusionModelRegistry._try_load_model_cls(config.model_class_name)
            _leave_out_other_components(pipeline_class, config)
            model = registry.initialize_model(config)
            model.weights_sources = [
                source for source in model.weights_sources if source.subfolder.startswith("transformer")
            ]
            loader = DiffusersPipelineLoader(LoadConfig(use_tqdm_on_load=False), config)
            loader.load_weights(model)
        process = functools.partial(loader._process_weights_after_loading, model, torch.device("cpu"))
        return Loaded(model.transformer, config.quantization_config, process)


def _lay_out(pipeline: Path, folder: Path) -> None:
    """Make the folder of a pipeline around a transformer."""
    config = json.loads((folder / "config.json").read_text())
    name = PIPELINES.get(config["_class_name"])
    if name is None:
        sys.exit(f"{config['_class_name']}: no pipeline of this class is known here. Known: {', '.join(PIPELINES)}.")
    for (class_name, key), other in OTHER_PIPELINES.items():
        if config["_class_name"] == class_name and config.get(key):
            name = other
    index = {"_class_name": name, "transformer": ["diffusers", config["_class_name"]]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    (pipeline / "transformer").symlink_to(folder.resolve())


def _leave_out_other_components(pipeline_class: type, config: Any) -> None:
    """Put a stand-in for everything that a pipeline builds beside its transformer."""
    from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs

    package = pipeline_class.__module__.rpartition(".")[0]
    for module in [module for name, module in sys.modules.items() if name.startswith(package)]:
        for name in list(vars(module)):
            if _OTHER_COMPONENTS.search(name) and name != pipeline_class.__name__:
                setattr(module, name, StandIn(name=name))
        # Its pipeline builds Z-Image in the published size, whatever config.json says.
        z_image = vars(module).get("ZImageTransformer2DModel")
        if z_image is not None:
            z_image = getattr(z_image, "func", z_image)
            sizes = get_transformer_config_kwargs(config.tf_model_config, z_image)
            module.ZImageTransformer2DModel = functools.partial(z_image, **sizes)


def _emulate() -> None:
    from vllm_omni.platforms import current_omni_platform

    platform = type(current_omni_platform)
    sdpa = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"
    platform.get_diffusion_attn_backend_cls = classmethod(lambda cls, *args, **options: sdpa)
    platform.supports_torch_inductor = classmethod(lambda cls: False)
    platform.synchronize = classmethod(lambda cls: None)
    platform.get_device_count = classmethod(lambda cls: 1)
    platform.set_device = classmethod(lambda cls, device: None)
    platform.get_torch_device = classmethod(lambda cls, local_rank=None: torch.device("cpu"))
    stand_in_for_fp8_rounding()
    stand_in_for_block_kernel()


@contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
