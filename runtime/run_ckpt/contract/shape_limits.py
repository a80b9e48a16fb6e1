"""Which shapes and dtypes of a weight each way to store it takes."""

from run_ckpt.contract.formats import BLOCK_FP8, FP8_BLOCK_SIZE, Scheme
from run_ckpt.contract.tensors import TensorSpec

QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")


def reason_to_keep(spec: TensorSpec, scheme: Scheme, naming: str, *, allow_unaligned_k: bool) -> str | None:
    """Return why the [N, K] weight must stay as it is under ``scheme``, or None."""
    N, K = spec.shape
    if spec.dtype not in QUANTIZABLE_DTYPES:
        return f"dtype {spec.dtype} is not quantized"
    wanted, k_multiple = scheme.format, _k_multiple(scheme, allow_unaligned_k)
    n_multiple = wanted.N_multiple
    if scheme == BLOCK_FP8 and naming == "transformers":
        # transformers dequantizes a block-scaled weight in blocks of N // ceil(N / 128), so that any other
        # shape comes out silently wrong (integrations/finegrained_fp8.py).
        n_multiple = k_multiple = FP8_BLOCK_SIZE
    if wanted.min_N > N:
        return f"N = {N} is under {wanted.min_N}"
    if N % n_multiple:
        return f"N = {N} is not a multiple of {n_multiple}"
    if K % k_multiple:
        would_do = k_multiple == scheme.layout.tuned_K > 1 and K % scheme.alignment[1] == 0
        return f"K = {K} is not a multiple of {k_multiple}{' (see --allow-unaligned-k)' if would_do else ''}"
    return None


def _k_multiple(scheme: Scheme, allow_unaligned_k: bool) -> int:
    layout_multiple = scheme.alignment[1] if allow_unaligned_k else scheme.layout.tuned_K
    return max(scheme.format.K_multiple, layout_multiple)
