"""Measure loading a converted checkpoint against its peers, in one run.

Builds a synthetic BF16 checkpoint and converts it, then times, each in a process of its own with a
warm page cache and without imports:

- load_file: safetensors' own load of the converted shards;
- load_quantized: ours, up to a model that can run; both map the files, and both times include one read of
  every page;
- online: load_file of the BF16 shards and quantizing each weight with our own kernels, which is what a
  server without an offline checkpoint does, only with faster kernels than any that ship for a CPU.

    python scripts/bench_load.py [--gib 2] [--folder DIR] [--repeats 5]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
GIB = 2**30
N, K = 8192, 4096
WAYS = ("load_file", "load_quantized", "online")


@click.command()
@click.option("--gib", default=2.0, show_default=True, help="Size of the BF16 checkpoint.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build it.  [default: a temporary folder]")
@click.option("--repeats", default=5, show_default=True, help="Runs of each kind; the table shows medians.")
@click.option("--measure", nargs=3, hidden=True, help="WAY FORMAT FOLDER: one measurement, in this process.")
def main(gib: float, folder: Path | None, repeats: int, measure: tuple[str, str, str] | None) -> None:
    """Print the table."""
    if measure:
        print(json.dumps(measure_here(measure[0], measure[1], Path(measure[2]))))
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        make_checkpoint(work / "bf16", int(gib * GIB))
        table = Table(title=f"load {gib:g} GiB of BF16 and what was made of it, page cache warm, medians of {repeats}")
        for column in (
            "format",
            "load_file",
            "load_quantized",
            "ratio",
            "BF16 + quantize",
            "times ours",
            "memory over the model",
        ):
            table.add_column(column, justify="left" if column == "format" else "right")
        for weight_format in ("mxfp4", "fp8"):
            convert(work / "bf16", work / weight_format, weight_format)
            table.add_row(weight_format, *row(work, weight_format, repeats))
        Console().print(table)


def make_checkpoint(folder: Path, nbytes: int) -> None:
    """Write linear weights of random BF16 in shards of a quarter of all."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "BenchTransformer2DModel"}))
    n_layers = max(4, nbytes // (2 * N * K))
    weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    weight_map = {}
    for number in range(4):
        names = [f"blocks.{layer}.proj.weight" for layer in range(number, n_layers, 4)]
        file_name = f"diffusion_pytorch_model-{number + 1:05}-of-00004.safetensors"
        save_file({name: weight.clone() for name in names}, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def convert(source: Path, output: Path, weight_format: str) -> None:
    command = [
        str(Path(sys.executable).with_name("convert-ckpt")),
        str(source),
        str(output),
        "--format",
        weight_format,
        "--preset=generic",
        "--quiet",
    ]
    subprocess.run(command, cwd=ROOT, check=True)


def row(work: Path, weight_format: str, repeats: int) -> list[str]:
    """Return the cells of one format. The ways take turns, so that all meet the same machine."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            results[way].append(measure_apart(way, weight_format, work))
    plain, ours, online = ([run["seconds"] for run in results[way]] for way in WAYS)
    ratios = [mine / theirs for mine, theirs in zip(ours, plain, strict=True)]
    gains = [theirs / mine for mine, theirs in zip(ours, online, strict=True)]
    extra = max(run["extra_nbytes"] for run in results["load_quantized"])
    return [
        f"{statistics.median(plain):.3f} s",
        f"{statistics.median(ours):.3f} s",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{statistics.median(online):.2f} s",
        f"{statistics.median(gains):.1f} ({min(gains):.1f} to {max(gains):.1f})",
        f"{extra / 2**20:.0f} MiB",
    ]


def measure_apart(way: str, weight_format: str, work: Path) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", way, weight_format, str(work)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_here(way: str, weight_format: str, work: Path) -> dict[str, float]:
    """Warm the page cache, then time one way; extra_nbytes is the peak over what was there and what is kept."""
    folder = work / ("bf16" if way == "online" else weight_format)
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        with open(shard, "rb", buffering=0) as file:
            buffer = bytearray(8 * 2**20)
            while file.readinto(buffer):
                pass
    work_once = {"load_file": load_files, "load_quantized": load_ours, "online": quantize_online}[way](
        folder, shards, weight_format
    )
    from run_ckpt.tools.memory import peak_nbytes

    before = peak_nbytes("cpu")
    started = time.perf_counter()
    kept = work_once()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "extra_nbytes": peak_nbytes("cpu") - before - kept}


def load_files(_folder: Path, shards: list[Path], _format: str) -> Callable[[], int]:
    from safetensors.torch import load_file

    def work() -> int:
        nbytes = 0
        for shard in shards:
            nbytes += touch(load_file(shard).values())
        return nbytes

    return work


def touch(tensors: Iterable[Any]) -> int:
    """Read a byte of each page; return how many bytes there are."""
    import torch

    page, nbytes = os.sysconf("SC_PAGE_SIZE"), 0
    for tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        flat[::page].sum()
        nbytes += flat.numel()
    return nbytes


def load_ours(folder: Path, _shards: list[Path], _format: str) -> Callable[[], int]:
    import torch
    from torch import nn

    from run_ckpt.loading.load import load_quantized

    n_layers = len(json.loads((folder / "quantization_manifest.json").read_text())["layers"])
    with torch.device("meta"):
        model = nn.Module()
        model.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(K, N, bias=False)}) for _ in range(n_layers))
    return lambda: touch(load_quantized(folder, model=model).buffers())


def quantize_online(_folder: Path, shards: list[Path], weight_format: str) -> Callable[[], int]:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch
    from safetensors.torch import load_file

    from convert_ckpt.kernels import fp8, mx
    from convert_ckpt.run.slab import fp8_scales
    from run_ckpt.contract.formats import AITER_MXFP4

    def to_mxfp4(bits: Any) -> Any:
        packed, codes = np.empty(bits.size // 2, np.uint8), np.empty(bits.size // 32, np.uint8)
        mx.quantize_slab(bits, "even", AITER_MXFP4, weight_out=packed, scale_out=codes, scale_pitch=K // 32)
        return packed, codes

    def to_fp8(bits: Any) -> Any:
        codes = np.empty(bits.shape, np.uint8)
        scale = fp8_scales(fp8.tile_maxima(bits, *bits.shape))
        fp8.encode_slab(bits, scale, *bits.shape, codes)
        return codes, scale

    encode = to_mxfp4 if weight_format == "mxfp4" else to_fp8
    encode(np.zeros((256, K), np.int16))

    def work() -> int:
        kept = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for shard in shards:
                weights = [tensor.view(torch.int16).numpy() for tensor in load_file(shard).values()]
                kept += list(pool.map(encode, weights))
        return sum(part.nbytes for parts in kept for part in parts)

    return work


if __name__ == "__main__":
    main()
