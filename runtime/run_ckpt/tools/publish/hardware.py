"""Which machines and kernels a stored form is for, as a sentence of the model card."""

from collections.abc import Iterator, Sequence

from run_ckpt.contract.formats import Scheme
from run_ckpt.contract.memory import load_nbytes, weights_nbytes
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.rows import ConvertedComponent

_SHARERS = {"group": "each {} along K", "tensor": "each layer", "channel": "each row", "block": "each 128 × 128 block"}


def hardware(scheme: Scheme) -> str:
    """Return what layers stored by ``scheme`` hold, and what runs them."""
    quant_format, layout = scheme.format, scheme.layout
    label = f"{quant_format.label}, {layout.label}" if len(quant_format.layouts) > 1 else quant_format.label
    stored = f"{quant_format.summary} for {_SHARERS[scheme.granularity].format(scheme.block[1])}"
    return f"**{label}** ({stored}): {layout.machines or quant_format.machines}"


def memory(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    """Yield what each component takes on the device."""
    for component in components:
        weights, load = (format_nbytes(of(component.manifest)) for of in (weights_nbytes, load_nbytes))
        which = f"`{component.name}` takes" if component.name else "It takes"
        yield f"{which} {weights} of memory, and about {load} while it is loaded, activations aside."
