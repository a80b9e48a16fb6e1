"""The diffusers or transformers model that config.json names, its parameters on the meta device."""

import importlib
import logging
import re
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

from torch import nn

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME
from run_ckpt.extras import naming_extras
from run_ckpt.storage.json_files import read_config

# Which kernels run is for this machine to choose. transformers would fetch one called "owner/name" from the Hub, and
# others where their package is missing.
_KERNEL_CHOICES = ("attn_implementation", "experts_implementation")

_logger = logging.getLogger(__name__)


def build_model(path: Path) -> Any:
    """Return the nn.Module that config.json in ``path`` describes; parameters on meta, non-persistent buffers real.

    The class is one of the installed diffusers or transformers: code that comes with the checkpoint (auto_map) or
    that it names on the Hub (attn_implementation) is never run. Raises CheckpointError where there is no such class.
    """
    with naming_extras("load_quantized without model="):
        from accelerate import init_empty_weights

    config = read_config(path)
    if config is None:
        raise CheckpointError(f"{path}: has no {CONFIG_NAME}. Fetch it, or pass model=.")
    with init_empty_weights(include_buffers=False):
        if "_class_name" in config:
            model = _diffusers_model(path, config)
        elif config.get("architectures"):
            model = _transformers_model(path, config)
        else:
            raise CheckpointError(f"{path / CONFIG_NAME}: names neither _class_name nor architectures. Pass model=.")
    if hasattr(model, "tie_weights"):
        # In there, each name of a tied tensor would have got a parameter of its own.
        model.tie_weights()
    return model


def find_renaming(model: Any) -> Callable[[str], str]:
    """Return what gives a tensor of a checkpoint its name in a model of transformers.

    Source: transformers 5 conversion_mapping.py, and the class attribute that came before it.
    """
    own = model.state_dict().keys()
    changes: list[Callable[[str], str]]
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        changes = [partial(re.sub, pattern, replacement) for pattern, replacement in patterns.items()]
    else:
        found = get_model_conversion_mapping(model, add_legacy=False)
        changes = [_first_of(change.rename_source_key) for change in found if isinstance(change, WeightRenaming)]

    def rename(name: str) -> str:
        return name if name in own else reduce(lambda renamed, change: change(renamed), changes, name)

    return rename


def _first_of(function: Callable[[str], tuple[str, Any]]) -> Callable[[str], str]:
    return lambda name: function(name)[0]


def _diffusers_model(path: Path, config: dict[str, Any]) -> Any:
    model_class = _find_class("diffusers", config["_class_name"], path)
    model = model_class.from_config({key: value for key, value in config.items() if key != CONFIG_KEY})
    # No argument of the class, but save_pretrained must write it.
    model.register_to_config(**{key: config[key] for key in (CONFIG_KEY,) if key in config})
    return model


def _transformers_model(path: Path, config: dict[str, Any]) -> Any:
    names = config["architectures"]
    model_class = _find_class("transformers", names[0] if isinstance(names, list) else names, path)
    return model_class._from_config(model_class.config_class.from_dict(_without_kernel_choices(path, config)))


def _find_class(library: str, name: Any, path: Path) -> Any:
    with naming_extras(f"{path / CONFIG_NAME}: {name}"):
        module = importlib.import_module(library)
    found = getattr(module, str(name), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(
            f"{path / CONFIG_NAME}: {name!r} is no model of {library} {module.__version__}."
            " Install a version that has it, or pass model=."
        )
    return found


def _without_kernel_choices(path: Path, config: Any) -> Any:
    """Return a config, or any part of one, without the names of kernels; one that is left out is logged."""
    if isinstance(config, list):
        return [_without_kernel_choices(path, part) for part in config]
    if not isinstance(config, dict):
        return config
    kept = {}
    for key, value in config.items():
        if key.strip("_").removesuffix("_internal") not in _KERNEL_CHOICES:
            kept[key] = _without_kernel_choices(path, value)
        elif value is not None:
            _logger.warning(
                "%s: %s %r is left out: a checkpoint does not choose the code that runs. To have it, call"
                " model.set_attn_implementation() or its like yourself.",
                path / CONFIG_NAME,
                key,
                value,
            )
    return kept
