"""The options of every command that runs a model: where it runs, and what a pipeline is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # it imports torch
    from run_ckpt.tools.generate import Placement

DTYPES = ("bfloat16", "float16", "float32")


def _check_device(_context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name is not None:
        import torch

        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # torch lists all the devices that it has heard of
            have = "cpu and cuda" if torch.cuda.is_available() else "cpu"
            raise click.BadParameter(f"{name!r} is no device of this machine, which has {have}.") from error
    return name


device_option = click.option("--device", callback=_check_device, help="[default: cuda if there is one, else cpu]")
activations_option = click.option(
    "--activations",
    metavar="FORMAT",
    help="Multiply the inputs of quantized layers in bf16 (as they come), fp8 (by token), mxfp8, nvfp4 or mxfp4."
    "  [default: as the backend does by itself]",
)
_PIPELINE_OPTIONS = (
    click.option("--negative-prompt", help="What to avoid."),
    click.option("--steps", "num_inference_steps", type=click.IntRange(1), help="Denoising steps."),
    click.option("--guidance-scale", type=float, help="How closely to follow the prompt."),
    click.option("--height", type=click.IntRange(1), help="In pixels."),
    click.option("--width", type=click.IntRange(1), help="In pixels."),
    click.option("--num-frames", type=click.IntRange(1), help="Of a video."),
)
_PIPELINE_ARGUMENTS = ("negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "num_frames")
_PLACEMENT_OPTIONS = (
    device_option,
    click.option(
        "--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of what is not quantized."
    ),
    click.option(
        "--backend", help="Run quantized layers on this one.  [default: the first that can, see inspect --device]"
    ),
    activations_option,
)


def default_device() -> str:
    """Return "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pipeline_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what a diffusers pipeline may be asked for; what is not given is left to it."""
    return _add(command, _PIPELINE_OPTIONS)


def pipeline_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pipeline's own arguments among the values of a command; None where not given."""
    return {name: options[name] for name in _PIPELINE_ARGUMENTS}


def placement_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add where a model runs."""
    return _add(command, _PLACEMENT_OPTIONS)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add where a model runs of which nothing is quantized."""
    return _add(command, _PLACEMENT_OPTIONS[:2])


def placement(options: Mapping[str, Any]) -> Placement:
    """Return the placement among the values of a command."""
    import torch

    from run_ckpt.tools.generate import Placement

    asked = (options.get("backend"), options.get("activations"))
    return Placement(options["device"] or default_device(), getattr(torch, options["dtype"]), *asked)


def _add(command: Callable[..., Any], options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
