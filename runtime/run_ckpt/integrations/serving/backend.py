"""Which backend multiplies a server's layers, by the same choice as everywhere; an environment variable names one."""

import os
from collections import Counter
from collections.abc import Sequence

from run_ckpt.backends.backend import Device
from run_ckpt.backends.choose import Choice, choose_backend
from run_ckpt.contract.manifest import Layer

# Names one backend for all layers, as --backend does elsewhere: that one or an error.
BACKEND_VARIABLE = "CONVERT_CKPT_BACKEND"
# What their inputs are multiplied in, as --activations.
ACTIVATIONS_VARIABLE = "CONVERT_CKPT_ACTIVATIONS"


def choose(layer: Layer, device: Device) -> Choice:
    """Return the first backend that can run the layer, as far as the environment leaves the choice."""
    asked = (os.environ.get(variable) or None for variable in (BACKEND_VARIABLE, ACTIVATIONS_VARIABLE))
    return choose_backend(layer, device, *asked)


def summarize(choices: Sequence[Choice], device: Device) -> str:
    """Return a line for the log: how many layers each backend takes, and why not those before it."""
    taken = Counter(choice.backend.name + _rounding(choice) for choice in choices)
    reasons = {name: reason for choice in choices for name, reason in choice.passed_over.items()}
    counts = ", ".join(f"{count} by {name}" for name, count in taken.items())
    passed_over = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
    return f"{len(choices)} quantized linears on {device}: {counts}{passed_over}"


def _rounding(choice: Choice) -> str:
    return f" with {choice.rounded_to} activations" if choice.rounded_to else ""
