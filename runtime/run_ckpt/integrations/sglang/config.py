"""The quantization config that SGLang holds for our checkpoints: the manifest, and methods yet to be decided."""

from pathlib import Path
from typing import Any

import torch
from sglang.multimodal_gen.runtime.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from sglang.multimodal_gen.runtime.layers.quantization.mxfp4 import Mxfp4Config

from run_ckpt.contract.errors import ManifestError
from run_ckpt.contract.manifest import Manifest
from run_ckpt.loading.checkpoint import open_to_load


class CheckpointConfig(Mxfp4Config):  # type: ignore[misc]
    """SGLang asks it for a method when it builds a linear, by a prefix that is empty or ambiguous in some models.

    So the decision waits until the model is whole and its map of names is known; see bind.py.
    """

    def __init__(self, manifest: Manifest):
        super().__init__(is_checkpoint_mxfp4_serialized=True)
        self.convert_ckpt_manifest = manifest

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> "PendingLinearMethod | None":
        return PendingLinearMethod() if isinstance(layer, LinearBase) else None


class PendingLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Holds the place of a weight until bind.py replaces it. It multiplies nothing."""

    def create_weights(self, *args: Any, **options: Any) -> None:
        UnquantizedLinearMethod().create_weights(*args, **options)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        raise ManifestError(
            f"{type(layer).__name__}: was loaded by a part of SGLang that the plug-in does not know. Only"
            " transformers of its diffusion pipelines can be loaded from a convert-ckpt result in this dialect."
        )

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("not bound")


def read_config(folder: Path) -> CheckpointConfig:
    """Return the configuration for the checkpoint in ``folder``, strictly checked but for its tensors' bytes."""
    with open_to_load(folder) as checkpoint:
        return CheckpointConfig(checkpoint.manifest)
