"""Measure a conversion against plainly reading and writing the same bytes, in one run.

Builds a synthetic BF16 checkpoint, then times, for each format and for a cold and a warm page
cache, (a) a loop that reads the input and writes as many bytes as the conversion does, with fsync, and
(b) the real `convert-ckpt` command, start-up included. Prints both, their ratio, the CPU seconds (user and system)
that each takes per GB of BF16, and the peak memory. A second table compares the kernels, and BLAKE3, with np.copyto
of the same bytes.

With --tensors it times one conversion to FP8 of a checkpoint of so many small tensors instead: of each three, a weight
[64, 256], its bias and a norm.

    python scripts/bench_convert.py [--gib 4] [--tensors 300000] [--folder DIR] [--repeats 3]
"""

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from run_ckpt.contract.formats import AITER_MXFP4, PLAIN_MXFP4, Scheme
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import build_header

CHUNK_NBYTES = 8 * 2**20
GIB = 2**30


@click.command()
@click.option("--gib", default=4.0, show_default=True, help="Size of the synthetic checkpoint.")
@click.option("--tensors", type=int, help="Time a checkpoint of so many small tensors instead.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build it.  [default: a temporary folder]")
@click.option("--repeats", default=3, show_default=True, help="Runs of each kind; the table shows medians.")
def main(gib: float, tensors: int | None, folder: Path | None, repeats: int) -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        source = work / "source"
        if tensors:
            print(bench_many(make_small_tensors(source, tensors), work / "out", tensors))
            return
        make_checkpoint(source, int(gib * GIB))
        Console().print(bench_end_to_end(source, work, repeats))
    Console().print(bench_kernels())


def make_checkpoint(folder: Path, nbytes: int) -> None:
    """Write four shards of random BF16 linear weights; the first holds one tensor of a quarter of all."""
    make_shards(folder, 4, nbytes // 4, large_first=True)


def make_shards(folder: Path, count: int, shard_nbytes: int, *, large_first: bool = False) -> Path:
    """Write shards of eight linear weights each, random BF16, and return the folder. large_first: one in the first."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "BenchTransformer2DModel"}))
    weight_map = {}
    noise = random_bf16(CHUNK_NBYTES)
    for number in range(count):
        file_name = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        is_large = large_first and number == 0
        n_tensors, K = (1, 16384) if is_large else (8, min(4096, shard_nbytes // 8 // 512 // 256 * 256))
        N = shard_nbytes // n_tensors // K // 2 // 256 * 256
        specs = [TensorSpec(f"blocks.{number * 8 + i}.proj.weight", "BF16", (N, K)) for i in range(n_tensors)]
        weight_map.update({spec.name: file_name for spec in specs})
        header = build_header(specs)
        with open(folder / file_name, "wb") as file:
            file.write(header.data)
            for offset in range(len(header.data), header.file_nbytes, CHUNK_NBYTES):
                file.write(noise[: min(CHUNK_NBYTES, header.file_nbytes - offset)])
            os.fsync(file.fileno())
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_small_tensors(folder: Path, count: int) -> Path:
    """Write eight shards of ``count`` small tensors together, random BF16, and return the folder."""
    shapes = {"proj.weight": (64, 256), "proj.bias": (64,), "norm.weight": (256,)}
    specs = [
        TensorSpec(f"blocks.{i // 10}.layer_{i % 10}.{name}", "BF16", shape)
        for i in range(-(-count // len(shapes)))
        for name, shape in shapes.items()
    ][:count]
    names = [f"diffusion_pytorch_model-{number:05}-of-00008.safetensors" for number in range(1, 9)]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "BenchTransformer2DModel"}))
    noise, weight_map = random_bf16(CHUNK_NBYTES), {}
    for number, name in enumerate(names):
        part = specs[count * number // 8 : count * (number + 1) // 8]
        header = build_header(part)
        with open(folder / name, "wb") as file:
            file.write(header.data)
            for offset in range(len(header.data), header.file_nbytes, CHUNK_NBYTES):
                file.write(noise[: min(CHUNK_NBYTES, header.file_nbytes - offset)])
        weight_map.update(dict.fromkeys((spec.name for spec in part), name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def bench_many(source: Path, output: Path, count: int) -> str:
    """Return what one conversion took."""
    run = convert(source, output, "fp8")
    times = f"{run.seconds:.1f} s, {run.cpu_seconds:.1f} s of CPU time"
    return f"{count:,} tensors: {times}, peak memory {run.peak_nbytes / 2**20:.0f} MiB"


def random_bf16(nbytes: int) -> bytes:
    """Return normally distributed BF16 values, standard deviation 0.02."""
    values = np.random.default_rng(0).standard_normal(nbytes // 2, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def bench_end_to_end(source: Path, work: Path, repeats: int) -> Table:
    """Return a table of wall times against the plain copy."""
    table = Table(title=f"end to end, {source_nbytes(source) / GIB:.3g} GiB of BF16, medians of {repeats}")
    numbers = ("read + write", "convert-ckpt", "ratio", "CPU s/GB", "convert-ckpt", "peak memory")
    for i, column in enumerate(("format", "page cache", *numbers)):
        table.add_column(column, justify="right" if i >= 2 else "left")
    n_gb = source_nbytes(source) / 1e9
    for weight_format in ("mxfp4", "fp8"):
        nbytes_out = convert(source, work / "out", weight_format).nbytes_out
        for cache in ("cold", "warm"):
            prepare = drop_cache if cache == "cold" else warm_cache
            plain: list[Run] = []
            ours: list[Run] = []
            for _ in range(repeats):
                prepare(source)
                plain.append(plain_copy(source, work / "copy", nbytes_out))
                prepare(source)
                ours.append(convert(source, work / "out", weight_format))
            ratios = [run.seconds / copy.seconds for run, copy in zip(ours, plain, strict=True)]
            table.add_row(
                weight_format,
                cache,
                *(f"{statistics.median(run.seconds for run in runs):.2f} s" for runs in (plain, ours)),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                *(f"{statistics.median(run.cpu_seconds for run in runs) / n_gb:.2f}" for runs in (plain, ours)),
                f"{max(run.peak_nbytes for run in ours) / 2**20:.0f} MiB",
            )
    return table


def source_nbytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


@dataclass(frozen=True)
class Run:
    """What one run took: wall time, CPU time of user and system, bytes written, most resident bytes."""

    seconds: float
    cpu_seconds: float
    nbytes_out: int
    peak_nbytes: int = 0


def convert(source: Path, output: Path, weight_format: str) -> Run:
    """Run the command."""
    command = [
        str(Path(sys.executable).with_name("convert-ckpt")),
        str(source),
        str(output),
        "--format",
        weight_format,
        "--preset=generic",
        "--quiet",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)}: failed")
    nbytes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    shutil.rmtree(output)
    return Run(seconds, usage.ru_utime + usage.ru_stime, nbytes, usage.ru_maxrss * 1024)


def plain_copy(source: Path, target: Path, nbytes_out: int) -> Run:
    """Read every byte of the shards and write ``nbytes_out`` of them."""
    share = nbytes_out / source_nbytes(source)
    # On a page of its own: a bytearray's place is one that some processors copy to at a fifth of their speed.
    buffer = mmap.mmap(-1, CHUNK_NBYTES)
    started, cpu_started = time.perf_counter(), time.process_time()
    with open(target, "wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while n_read := file.readinto(buffer):
                    out.write(memoryview(buffer)[: int(n_read * share)])
        os.fsync(out.fileno())
    run = Run(time.perf_counter() - started, time.process_time() - cpu_started, nbytes_out)
    target.unlink()
    return run


def drop_cache(source: Path) -> None:
    """Make the kernel forget the shards."""
    os.sync()
    for path in source.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(source: Path) -> None:
    """Read the shards once."""
    os.sync()
    buffer = bytearray(CHUNK_NBYTES)
    for path in source.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def bench_kernels() -> Table:
    """Return a table of kernel speeds in bytes of BF16 input, as shares of np.copyto."""
    from blake3 import blake3

    from convert_ckpt.kernels import fp8, mx
    from convert_ckpt.run.schedule import SLAB_NBYTES

    # As many bytes as the converter hands a kernel at a time.
    rows, K, n_threads = SLAB_NBYTES // 2 // 4096, 4096, os.cpu_count() or 1
    weights = [np.frombuffer(random_bf16(rows * K * 2), np.int16).reshape(rows, K) for _ in range(n_threads)]
    scales = np.full((1, 1), 1e-3, np.float32)

    def copy(weight: np.ndarray) -> Callable[[], object]:
        target = np.ones_like(weight)
        return lambda: np.copyto(target, weight)

    def quantize(rule: str, scheme: Scheme) -> Callable[[np.ndarray], Callable[[], object]]:
        def bind(weight: np.ndarray) -> Callable[[], object]:
            packed, codes = np.ones(rows * K // 2, np.uint8), np.ones(rows * K // 32, np.uint8)
            return lambda: mx.quantize_slab(
                weight, rule, scheme, weight_out=packed, scale_out=codes, scale_pitch=K // 32
            )

        return bind

    def encode(weight: np.ndarray) -> Callable[[], object]:
        codes = np.ones((rows, K), np.uint8)
        return lambda: fp8.encode_slab(weight, scales, rows, K, codes)

    def hash_slab(weight: np.ndarray) -> Callable[[], object]:
        digest = blake3()
        return lambda: digest.update(weight.data.cast("B"))

    kernels = {
        "np.copyto": copy,
        "mxfp4 even, aiter": quantize("even", AITER_MXFP4),
        "mxfp4 even, plain": quantize("even", PLAIN_MXFP4),
        "mxfp4 mse, aiter": quantize("mse", AITER_MXFP4),
        "fp8 amax": lambda weight: lambda: fp8.tile_maxima(weight, rows, K),
        "fp8 encode": encode,
        "BLAKE3": hash_slab,
    }
    table = Table(title=f"kernels, {n_threads} threads")
    table.add_column("kernel")
    table.add_column("BF16 input", justify="right")
    table.add_column("of np.copyto", justify="right")
    base = 0.0
    for name, kernel in kernels.items():
        speed = best_speed([kernel(weight) for weight in weights], rows * K * 2)
        base = base or speed
        table.add_row(name, f"{speed / 1e9:.2f} GB/s", f"{speed / base:.2f}")
    return table


def best_speed(calls: list[Callable[[], object]], nbytes: int, n_rounds: int = 20) -> float:
    """Return bytes per second of all calls run side by side, the best of ``n_rounds``.

    Each thread repeats its call, as starting one takes about as long as a call.
    """
    n_calls = 16

    def repeat(call: Callable[[], object]) -> None:
        for _ in range(n_calls):
            call()

    seconds = min(run_together([partial(repeat, call) for call in calls]) for _ in range(n_rounds))
    return n_calls * nbytes * len(calls) / seconds


def run_together(calls: list[Callable[[], object]]) -> float:
    """Run each call on a thread of its own; return seconds."""
    with ThreadPoolExecutor(len(calls)) as pool:
        started = time.perf_counter()
        for done in [pool.submit(call) for call in calls]:
            done.result()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
