"""Time GPTQ of whole layers against the two products that no such method can do without.

Those are X'X of 8,192 rows of inputs, without which nothing is known of a layer, and one product of the weight with H.
Layers run side by side, one on each core with one BLAS thread each, as in a conversion; so do the products.

One run on 2 cores (AMD EPYC with AVX-512, other work on both), N = K = 3072, medians of 5: two products 0.85 s, GPTQ
1.06 s with all it measures (output errors and signal on held out inputs), ratio 1.24 (0.72 to 1.29). With nothing else
running: 0.58 s, 0.80 s, ratio 1.38 (1.36 to 1.40).
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from convert_ckpt.methods.gptq import factorize, round_rows
from convert_ckpt.methods.grid import ROWS_AT_ONCE, Grid

N_INPUT_ROWS = 8192
BLOCK = 32


def main() -> None:
    """Print the times of one layer, and the ratio."""
    arguments = parse_arguments()
    n_layers = os.cpu_count() or 1
    K = arguments.size
    rng = np.random.default_rng(0)
    x = make_inputs(rng, K)
    weight = rng.standard_normal((K, K), dtype=np.float32)
    hessian = x.T @ x / np.float32(N_INPUT_ROWS)

    def two_products() -> None:
        _ = x.T @ x
        _ = weight @ hessian

    def layer() -> None:
        quantize_layer(weight, hessian)

    quantize_layer(weight[:BLOCK], hessian)  # compiles the kernel
    rounds = [(side_by_side(two_products, n_layers), side_by_side(layer, n_layers)) for _ in range(arguments.rounds)]
    products, layers = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratios = [ours / theirs for theirs, ours in rounds]
    print(f"N = K = {K}, {n_layers} layers side by side, medians of {arguments.rounds}, seconds a layer:")
    print(f"two products {products:.2f}, GPTQ with its measures {layers:.2f}")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=3072, metavar="K", help="of a K x K layer (default: 3072)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median counts (default: 5)")
    return parser.parse_args()


def make_inputs(rng: np.random.Generator, K: int) -> np.ndarray:
    """Return float32 [8192, K] of correlated channels of different size."""
    shared = rng.standard_normal((N_INPUT_ROWS, 64), dtype=np.float32) @ rng.standard_normal((64, K), dtype=np.float32)
    sizes = np.exp(rng.standard_normal(K, dtype=np.float32))
    return (rng.standard_normal((N_INPUT_ROWS, K), dtype=np.float32) + shared / 8) * sizes


def quantize_layer(weight: np.ndarray, hessian: np.ndarray) -> None:
    """Do what a conversion to MXFP4 does with a layer, reading and writing apart."""
    K = weight.shape[1]
    factor = factorize(hessian)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[start : start + ROWS_AT_ONCE]
        amax = np.abs(rows.reshape(len(rows), -1, BLOCK)).max(-1)
        scales = np.ldexp(np.float32(1), np.frexp(amax)[1] - 3)
        round_rows(rows, Grid("e2m1", np.ascontiguousarray(scales.T), np.arange(K) // BLOCK), [factor], [hessian])


def side_by_side(work: Callable[[], None], n_at_once: int) -> float:
    """Return the seconds that ``work`` takes on average, run ``n_at_once`` times at the same time."""
    with ThreadPoolExecutor(n_at_once) as pool:
        start = time.perf_counter()
        for future in [pool.submit(work) for _ in range(n_at_once)]:
            future.result()
        return (time.perf_counter() - start) / n_at_once


if __name__ == "__main__":
    main()
