"""Checkpoints as Nunchaku's are: codes placed one by one where its kernels' lanes read them, with what they stand for.

Source: deepcompressor 69f3473, backend/nunchaku/utils.py and backend/tinychat/utils.py, its comments on lanes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.foreign import E2M1
from tests.models import MODELS

SHIFT, RANK = 0.171875, 32
# Module of Nunchaku's in each block -> diffusers' modules whose rows it holds, one below the other.
FLUX_DOUBLE = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
    "norm1.linear": ("norm1.linear",),
    "norm1_context.linear": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "mlp_fc1": ("proj_mlp",),
    "out_proj+mlp_fc2": ("proj_out",),
    "norm.linear": ("norm.linear",),
}
QWEN = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    **{
        name: (name,)
        for name in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj")
    },
    **{name: (name,) for name in ("txt_mlp.net.2", "img_mod.1", "txt_mod.1")},
}
Z_IMAGE = {
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_out.0": ("attention.to_out.0",),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
    "feed_forward.net.2": ("feed_forward.w2",),
}
MODULES = {
    "flux1": {"transformer_blocks": FLUX_DOUBLE, "single_transformer_blocks": FLUX_SINGLE},
    "qwen-image": {"transformer_blocks": QWEN},
    "z-image": {"layers": Z_IMAGE, "noise_refiner": Z_IMAGE},  # and a refiner that is only fused, as below
}
SHIFTED = ("mlp_fc2", "mlp_context_fc2", "img_mlp.net.2", "txt_mlp.net.2")


@dataclass
class Written:
    """A file, its values under the names it has once decoded, and under diffusers'."""

    path: Path
    stored: dict[str, Tensor]
    values: dict[str, Tensor]


def place(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return a vector that has each value at its index."""
    out = torch.zeros(size, dtype=values.dtype)
    out[index.flatten()] = values.flatten()
    return out


def pack_codes(codes: Tensor) -> Tensor:
    """int8 [N, K / 2] of codes 0..15 [N, K]: a lane's 8 bytes of each tile [16, 64] are 4 runs of 8 columns."""
    N, K = codes.shape
    n, k = torch.arange(N)[:, None], torch.arange(K)
    lane = n % 8 * 4 + k % 32 // 8
    run = n % 16 // 8 * 2 + k % 64 // 32
    at = (((n // 128 * (K // 64) + k // 64) * 8 + n % 128 // 16) * 32 + lane) * 4 + run
    nibbles = place(codes, at * 8 + k % 8, N * K)
    return (nibbles[::2] | nibbles[1::2] << 4).to(torch.uint8).view(torch.int8).reshape(N, K // 2)


def vector_index(n: Tensor) -> Tensor:
    """Lane 0 holds rows 0 1 8 9, lane 1 rows 2 3 10 11, lane 4 rows 16 17 24 25."""
    lane = n % 128 // 16 * 4 + n % 8 // 2
    return n // 128 * 128 + lane * 4 + n % 16 // 8 * 2 + n % 2


def pack_vector(vector: Tensor) -> Tensor:
    return place(vector, vector_index(torch.arange(len(vector))), len(vector))


def pack_scales(scales: Tensor) -> Tensor:
    """[K / 64, N] of [N, K / 64]: vectors of 128, group after group, tile after tile."""
    N, G = scales.shape
    n, g = torch.arange(N)[:, None], torch.arange(G)
    at = vector_index(n % 128) + (n // 128 * G + g) * 128
    return place(scales, at, N * G).reshape(G, N)


def pack_micro_scales(scales: Tensor) -> Tensor:
    """float8 [K / 16, N]: lane 0 holds 4 scales of each row 0 32 64 96, lane 1 of 8 40 .., lane 4 of 1 33 ..."""
    N, G = scales.shape
    n, g = torch.arange(N)[:, None], torch.arange(G)
    lane = n % 8 * 4 + n % 32 // 8
    at = ((n // 128 * (G // 4) + g // 4) * 32 + lane) * 16 + n % 128 // 32 * 4 + g % 4
    return place(scales.view(torch.uint8), at, N * G).reshape(G, N).view(torch.float8_e4m3fn)


def pack_branch(matrix: Tensor, *, is_down: bool) -> Tensor:
    """[channels, rank] of up, or of down transposed: in tiles of 16 x 16 a lane holds pairs along the inner axis."""
    C, R = matrix.shape
    c, r = torch.arange(C)[:, None], torch.arange(R)
    outer, inner = (r, c) if is_down else (c, r)
    lane = outer % 8 * 4 + inner % 8 // 2
    at = (c // 16 * (R // 16) + r // 16) * 256 + lane * 8 + outer % 16 // 8 * 4 + inner % 16 // 8 * 2 + inner % 2
    return place(matrix, at, C * R).reshape(C, R)


def pack_awq(codes: Tensor) -> Tensor:
    """int32 [N / 4, K / 2] of codes 0..15 [N, K]: int16 of columns j, 8 + j, 16 + j, 24 + j; 4 rows in one another."""
    N, K = codes.shape
    n, k = torch.arange(N)[:, None], torch.arange(K)
    word = n // 4 * K + k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
    nibbles = place(codes, word * 4 + k % 32 // 8, N * K).reshape(-1, 2)
    return (nibbles[:, 0] | nibbles[:, 1] << 4).to(torch.uint8).view(torch.int32).reshape(N // 4, K // 2)


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def linear(
    N: int, K: int, seed: int, *, nvfp4: bool, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The tensors of a weight, float64 [N, K] that it stands for, and that without the branch.

    names: of smoothing, low-rank branch down and up.
    """
    codes = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(seed))
    smooth = random(K, seed=seed + 1).abs() + 0.5
    up, down = random(N, RANK, seed=seed + 2, scale=0.05), random(RANK, K, seed=seed + 3, scale=0.05)
    stored = {"qweight": pack_codes(codes)}
    if nvfp4:
        scales = (random(N, K // 16, seed=seed + 4).float().abs() + 1).to(torch.float8_e4m3fn)
        alpha, channels = torch.tensor(0.01), random(N, seed=seed + 5).abs() + 0.5
        values = E2M1.double()[codes] * scales.double().repeat_interleave(16, 1)
        values = values * alpha.double() * channels.double()[:, None]
        stored |= {"wscales": pack_micro_scales(scales), "wtscale": alpha, "wcscales": pack_vector(channels)}
    else:
        scales = (random(N, K // 64, seed=seed + 4).abs() + 0.5) / 100
        values = ((codes + 8) % 16 - 8).double() * scales.double().repeat_interleave(64, 1)
        stored["wscales"] = pack_scales(scales)
    residual = values / smooth.double()
    stored |= {names[0]: pack_vector(smooth), f"{names[0]}_orig": pack_vector(smooth)}
    stored |= {names[1]: pack_branch(down.T, is_down=True), names[2]: pack_branch(up, is_down=False)}
    return stored, residual + up.double() @ down.double(), residual


def modulation(N: int, K: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a modulation's weight and bias, and the float32 weight: vectors are interleaved in 3 or 6."""
    n_vectors = 3 if N == 3 * K else 6
    codes = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(seed))
    scales = (random(N, K // 64, seed=seed).abs() + 0.5) / 100
    zeros = random(N, K // 64, seed=seed + 1, scale=0.05)
    grouped = codes.reshape(N, -1, 64).float() * scales.float()[..., None] + zeros.float()[..., None]
    order = torch.arange(N).reshape(n_vectors, -1).T.flatten()  # element i of all vectors before i + 1 of any
    stored = {"qweight": pack_awq(codes[order]), "wscales": scales[order].T, "wzeros": zeros[order].T}
    return stored, grouped.reshape(N, K)


def modulation_bias(bias: Tensor, K: int) -> Tensor:
    """A bias as it is stored: interleaved, 1 added to what scales."""
    n_vectors = 3 if len(bias) == 3 * K else 6
    vectors = bias.reshape(n_vectors, -1).clone()
    for scale in {1, n_vectors - 2}:
        vectors[scale] += 1
    return vectors.T.flatten()


def write(path: Path, family: str, *, nvfp4: bool = False) -> Written:
    """Write a model in 4 bits; return its values in float32 under diffusers' names."""
    names = ("smooth", "lora_down", "lora_up") if family == "flux1" else ("smooth_factor", "proj_down", "proj_up")
    state = {name: tensor.contiguous() for name, tensor in MODELS[family].build().state_dict().items()}
    values = {name: tensor.float() for name, tensor in state.items()}
    stored: dict[str, Tensor] = {}
    for stack, modules in MODULES[family].items():
        for block in sorted({int(name.split(".")[1]) for name in state if name.startswith(f"{stack}.")}):
            for seed, (module, targets) in enumerate(modules.items()):
                prefix = f"{stack}.{block}."
                encode = _Module(prefix, state, values, stored, names, nvfp4)
                encode(module, targets, 100 * block + 10 * seed + (1000 if stack.startswith("single") else 0))
    if family == "z-image":
        w1, w2, w3 = (state.pop(f"context_refiner.0.feed_forward.w{i}.weight") for i in (1, 2, 3))
        state["context_refiner.0.feed_forward.net.0.proj.weight"] = torch.cat([w3, w1])
        state["context_refiner.0.feed_forward.net.2.weight"] = w2
    if family == "flux1":
        state = {name.replace(".attn.norm_", ".norm_"): tensor for name, tensor in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in {**stored, **state}.items()}, path)
    return Written(path, stored, values)


@dataclass
class _Module:
    """Moves the weights and biases of a module from ``state`` to ``stored``, and says in ``values`` what these are."""

    prefix: str
    state: dict[str, Tensor]
    values: dict[str, Tensor]
    stored: dict[str, Tensor]
    names: tuple[str, ...]
    nvfp4: bool

    def __call__(self, module: str, targets: tuple[str, ...], seed: int) -> None:
        weights = [self.state.pop(f"{self.prefix}{target}.weight") for target in targets]
        biases = [self.state.pop(f"{self.prefix}{target}.bias", None) for target in targets]
        bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
        (N, K), sizes = torch.cat(weights).shape, [len(weight) for weight in weights]
        if module.endswith((".linear", "_mod.1")):
            stored, weight = modulation(N, K, seed)
            assert bias is not None
            bits = modulation_bias(bias, K)
            stored["bias"] = bits
            self._keep(module, stored)
            plain = bits.float().reshape(K, -1).T.clone()  # as rounded when 1 was added
            for scale in {1, len(plain) - 2}:
                plain[scale] -= 1
            self._expect(targets, sizes, weight, plain.flatten())
            return
        parts = module.split("+")
        widths = [K] if len(parts) == 1 else [N, K - N]
        whole, plain_bias = [], None if bias is None else bias.double()
        for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
            stored, weight, residual = linear(N, width, seed + 5000 * i, nvfp4=self.nvfp4, names=self.names)
            whole.append(weight)
            if bias is not None:
                stored["bias"] = pack_vector(bias if part == parts[-1] else torch.zeros_like(bias))
            if part in SHIFTED and not self.nvfp4:
                assert plain_bias is not None
                plain_bias = plain_bias + SHIFT * residual.sum(1)
            self._keep(part, stored)
        self._expect(targets, sizes, torch.cat(whole, 1).float(), None if plain_bias is None else plain_bias.float())

    def _keep(self, module: str, stored: dict[str, Tensor]) -> None:
        self.stored |= {f"{self.prefix}{module}.{leaf}": tensor for leaf, tensor in stored.items()}

    def _expect(self, targets: tuple[str, ...], sizes: list[int], weight: Tensor, bias: Tensor | None) -> None:
        split: Callable[[Tensor], tuple[Tensor, ...]] = lambda whole: whole.split(sizes)  # noqa: E731
        for target, part in zip(targets, split(weight), strict=True):
            self.values[f"{self.prefix}{target}.weight"] = part
        if bias is not None:
            for target, part in zip(targets, split(bias), strict=True):
                self.values[f"{self.prefix}{target}.bias"] = part
