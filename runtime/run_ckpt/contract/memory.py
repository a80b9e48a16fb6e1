"""How much memory a result takes on the device that it is loaded to."""

from run_ckpt.contract.manifest import Manifest


def weights_nbytes(manifest: Manifest) -> int:
    """Return the bytes of all tensors as they are stored."""
    layers, kept = manifest.layers.values(), manifest.kept.values()
    return sum(sum(spec.nbytes for spec in layer.specs().values()) for layer in layers) + sum(
        tensor.spec.nbytes for tensor in kept
    )


def load_nbytes(manifest: Manifest) -> int:
    """Return about the most bytes while it is loaded, when the largest layer may exist in two orders of bytes."""
    layers = manifest.layers.values()
    largest = max((sum(spec.nbytes for spec in layer.specs().values()) for layer in layers), default=0)
    return weights_nbytes(manifest) + largest
