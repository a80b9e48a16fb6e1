"""Which tensors are weights of linear layers."""

from functools import cache

from run_ckpt.contract.tensors import TensorSpec

WEIGHT_SUFFIX = ".weight"


def linear_module(spec: TensorSpec) -> str | None:
    """Return the module name where ``spec`` looks like a linear layer's weight, else None."""
    if len(spec.shape) == 2 and spec.name.endswith(WEIGHT_SUFFIX) and 0 not in spec.shape:
        return spec.name[: -len(WEIGHT_SUFFIX)]
    return None


def reason_not_linear(spec: TensorSpec) -> str:
    """Return why a tensor is no linear weight."""
    if not spec.name.endswith(WEIGHT_SUFFIX):
        return "not a weight"
    return _not_linear(len(spec.shape))


@cache  # one text for all of them, in a checkpoint of very many
def _not_linear(n_dims: int) -> str:
    return f"not a linear weight ({n_dims}-D)"
