"""Which machines and kernels a stored form is for, as a sentence of the model card."""

from run_ckpt.contract.formats import Scheme

_SHARERS = {"group": "each {} along K", "tensor": "each layer", "channel": "each row", "block": "each 128 × 128 block"}


def hardware(scheme: Scheme) -> str:
    """Return what layers stored by ``scheme`` hold, and what runs them."""
    quant_format, layout = scheme.format, scheme.layout
    label = f"{quant_format.label}, {layout.label}" if len(quant_format.layouts) > 1 else quant_format.label
    stored = f"{quant_format.summary} for {_SHARERS[scheme.granularity].format(scheme.block[1])}"
    return f"**{label}** ({stored}): {layout.machines or quant_format.machines}"
