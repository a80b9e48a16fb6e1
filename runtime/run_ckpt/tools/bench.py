"""`run-ckpt bench`: a checkpoint's layers on their backends against BF16, and loading it against plain reading."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.manifest import Layer
from run_ckpt.loading.checkpoint import open_to_load
from run_ckpt.loading.fill import map_tensor
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.loading.load import load_quantized
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.rows import STORED_DTYPES
from run_ckpt.tools.memory import peak_nbytes, tensor_nbytes

_MIN_SECONDS = 0.2
_READ_NBYTES = 8 * 2**20
# The backend, and the activations, of QuantizedLinear and load_quantized.
_Asked = tuple[str | None, str | None]


@dataclass(frozen=True)
class LayerTime:
    """One shape of layer at one M. ``ratio`` is the time of BF16 F.linear by that of the backend.

    ``tflops`` is 2 M N K by the time; ``gbytes_per_s`` is the weight with its scales by the time.
    """

    format: str
    N: int
    K: int
    count: int
    backend: str
    activations: str
    M: int
    seconds: float
    bf16_seconds: float
    ratio: float
    tflops: float
    gbytes_per_s: float


@dataclass(frozen=True)
class LoadTime:
    """Loading the whole component, page cache warm, against reading its shards into one buffer."""

    seconds: float
    read_seconds: float
    ratio: float
    model_nbytes: int
    peak_nbytes: int


@dataclass(frozen=True)
class Bench:
    """What `bench` measured of one component. ``load`` is None where config.json names no known class."""

    device: str
    layers: tuple[LayerTime, ...]
    load: LoadTime | None
    why_no_load: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_component(
    path: Path,
    *,
    device: str,
    backend: str | None,
    activations: str | None = None,
    rows: Sequence[int],
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> Bench:
    """Return times of every distinct layer shape at each M of ``rows``, and of loading the component.

    Raises CheckpointError for a checkpoint that can't be read or a backend that can't run.
    """
    target, asked = torch.device(device), (backend, activations)
    times = []
    with open_to_load(path) as checkpoint:
        for alike in _alike(checkpoint.manifest.layers.values()):
            linear = _read_linear(checkpoint, alike[0], target, asked)
            for M in rows:
                say(f"{alike[0].format} [{alike[0].N}, {alike[0].K}] at M = {M}")
                times.append(_time_layer(linear, len(alike), M, target, dtype))
    say("loading")
    try:
        return Bench(device, tuple(times), _time_load(path, target, asked))
    except CheckpointError as error:
        return Bench(device, tuple(times), None, str(error))


def _alike(layers: Iterable[Layer]) -> list[list[Layer]]:
    groups: dict[tuple[str, int, int], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.format.name, layer.N, layer.K), []).append(layer)
    return list(groups.values())


def _read_linear(checkpoint: Checkpoint, layer: Layer, device: torch.device, asked: _Asked) -> QuantizedLinear:
    tensors = {}
    for role, spec in layer.specs().items():
        stored = checkpoint.reader.spec(spec.name)
        assert stored is not None
        # Other tools may store a scale in 16 bits, and as a scalar.
        tensor = map_tensor(checkpoint.reader, stored).to(device, STORED_DTYPES[spec.dtype])
        tensors[role] = tensor.reshape(spec.shape)
    linear = QuantizedLinear(layer, backend=asked[0], activations=asked[1])
    linear.store(tensors)
    linear.prepare(device)
    return linear


def _time_layer(linear: QuantizedLinear, count: int, M: int, device: torch.device, dtype: torch.dtype) -> LayerTime:
    layer = linear.layer
    x = torch.randn(M, layer.K, device=device).to(dtype)
    weight = torch.randn(layer.N, layer.K, device=device).to(dtype)
    with torch.inference_mode():
        seconds = _median_seconds(lambda: linear(x))
        bf16_seconds = _median_seconds(lambda: F.linear(x, weight))
    nbytes = sum(spec.nbytes for spec in layer.specs().values())
    return LayerTime(
        format=layer.format.name,
        N=layer.N,
        K=layer.K,
        count=count,
        backend=str(linear.backend),
        activations=str(linear.activations),
        M=M,
        seconds=seconds,
        bf16_seconds=bf16_seconds,
        ratio=bf16_seconds / seconds,
        tflops=2 * M * layer.N * layer.K / seconds / 1e12,
        gbytes_per_s=nbytes / seconds / 1e9,
    )


def _median_seconds(work: Callable[[], Tensor]) -> float:
    """torch's own timer: it warms up and waits for the device."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=_MIN_SECONDS).median)


def _time_load(path: Path, device: torch.device, asked: _Asked) -> LoadTime:
    from run_ckpt.loading.build import build_model

    shards = sorted(path.glob("*.safetensors"))
    _read_files(shards)  # warm the page cache for both
    started = time.perf_counter()
    _read_files(shards)
    read_seconds = time.perf_counter() - started
    empty = build_model(path)
    started = time.perf_counter()
    model = load_quantized(path, model=empty, device=device, backend=asked[0], activations=asked[1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return LoadTime(seconds, read_seconds, seconds / read_seconds, tensor_nbytes(model), peak_nbytes(device))


def _read_files(paths: Sequence[Path]) -> None:
    buffer = bytearray(_READ_NBYTES)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
