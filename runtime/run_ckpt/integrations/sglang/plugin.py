"""The entry point: two hooks into SGLang's loader. For a checkpoint that is not ours they import and change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_ckpt.contract.dialects.table import PRIVATE_KEY
from run_ckpt.contract.targets import SGLANG_DIALECTS

_GET_CONFIG = "sglang.multimodal_gen.runtime.utils.quantization_utils.get_quant_config"
_LOAD_STATE = "sglang.multimodal_gen.runtime.loader.fsdp_load.load_model_from_full_model_state_dict"


def register() -> None:
    """Register the hooks; SGLang calls this in every process (group ``sglang.multimodal_gen.plugins``)."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(_GET_CONFIG, get_quant_config, HookType.AROUND)
    HookRegistry.register(_LOAD_STATE, load_state, HookType.AROUND)


def get_quant_config(original: Callable[..., Any], model_config: Any, folder: str, *args: Any, **options: Any) -> Any:
    """Return our configuration for our checkpoint in ``folder``, SGLang's for any other."""
    if not _is_ours(model_config):
        return original(model_config, folder, *args, **options)
    from run_ckpt.integrations.sglang.config import read_config

    return read_config(Path(folder))


def load_state(original: Callable[..., Any], model: Any, *args: Any, **options: Any) -> Any:
    """Load SGLang's way, after each linear of the new model was given what the manifest says of it."""
    configs = (getattr(module, "quant_config", None) for module in model.modules())
    manifest = next(filter(None, (getattr(config, "convert_ckpt_manifest", None) for config in configs)), None)
    if manifest is not None:
        from run_ckpt.integrations.sglang.bind import bind

        options = {**options, "param_names_mapping": bind(model, manifest, options["param_names_mapping"])}
    return original(model, *args, **options)


def _is_ours(model_config: Any) -> bool:
    from sglang.srt.model_loader.checkpoint_quantization import resolve_checkpoint_quant_spec

    declared = resolve_checkpoint_quant_spec(model_config)
    if declared is None or PRIVATE_KEY not in declared.config:
        return False
    # What SGLang's diffusion runtime reads by itself is left to it.
    return declared.config.get("quant_method") not in SGLANG_DIALECTS
