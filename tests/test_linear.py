"""The quantized linear layer: numbers, what its state is, and what can't happen to its codes."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run_ckpt.backends.backend import Device
from run_ckpt.contract.codec import dequantize
from run_ckpt.contract.errors import BackendError, FaultsError, UsageError
from run_ckpt.contract.formats import MXFP4, MXFP8, NVFP4, PLAIN_NVFP4
from run_ckpt.contract.manifest import TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.loading.replace import replace_linears
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.codec import dequantize_fp8, dequantize_mxfp4, dequantize_mxfp8, quantize_mxfp4
from tests.layers import MODULE, SCHEMES, describe_layer, make_layer

N, K = 288, 256
CPU = torch.device("cpu")


def decode(scheme: str) -> Tensor:
    """Return the float32 weight that make_linear's layer stands for, by the contract's codec alone."""
    weight = random_weight(N, K)
    if SCHEMES[scheme].format == MXFP4:
        return dequantize_mxfp4(*quantize_mxfp4(weight, "even"))
    tensors = make_layer(scheme, weight)[1]
    if SCHEMES[scheme].format == NVFP4:
        return dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], PLAIN_NVFP4, tensors[TENSOR_SCALE])
    if SCHEMES[scheme].format == MXFP8:
        return dequantize_mxfp8(tensors[WEIGHT], tensors[WEIGHT_SCALE])
    return dequantize_fp8(tensors[WEIGHT], tensors[WEIGHT_SCALE])


def make_linear(scheme: str, *, bias: bool = True, backend: str | None = None) -> QuantizedLinear:
    layer, tensors = make_layer(scheme, random_weight(N, K))
    parameter = nn.Parameter(torch.linspace(-1, 1, N).bfloat16(), requires_grad=False) if bias else None
    linear = QuantizedLinear(layer, parameter, backend)
    linear.store(tensors)
    return linear


def activations(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["reference", "dequantize"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_is_f_linear_of_the_decoded_weight(scheme: str, backend: str, dtype: torch.dtype) -> None:
    linear, decoded = make_linear(scheme, bias=False, backend=backend), decode(scheme)
    x = activations(2, 5, K, dtype=dtype)
    # One-off dequantization stores BF16, whatever the activations are.
    weight = decoded.bfloat16().to(dtype) if backend == "dequantize" else decoded.to(dtype)
    assert_bits_equal(linear(x), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(K,), (1, K), (3, 4, 5, K), (0, K)], ids=str)
def test_takes_any_leading_dimensions_and_adds_the_bias(shape: tuple[int, ...]) -> None:
    linear, decoded = make_linear("mxfp4-aiter"), decode("mxfp4-aiter")
    x = activations(*shape)
    assert_bits_equal(linear(x), F.linear(x, decoded.bfloat16(), linear.bias))


def test_takes_strided_activations() -> None:
    linear, decoded = make_linear("fp8-tensor", bias=False), decode("fp8-tensor")
    x = activations(K, 6).t()
    # On some CPUs torch's own sums depend on the strides, so it gets the same numbers row by row.
    assert_bits_equal(linear(x), F.linear(x.contiguous(), decoded.bfloat16()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_holds_the_bytes_on_disk_before_and_after_prepare(scheme: str) -> None:
    linear = make_linear(scheme)
    tensors = make_layer(scheme, random_weight(N, K))[1]
    names = linear.layer.tensors
    for _ in range(2):
        state = linear.state_dict(prefix=f"{MODULE}.")
        assert set(state) == {f"{MODULE}.bias", *names.values()}
        for role, tensor in tensors.items():
            assert_bits_equal(state[names[role]], tensor)
        linear.prepare(CPU)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_load_state_dict_replaces_a_prepared_weight(scheme: str) -> None:
    linear = make_linear(scheme)
    other = make_linear(scheme)
    x = activations(4, K)
    expected = linear(x)
    other.prepare(CPU)
    other.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in linear.state_dict().items()})
    assert not other(x).any()
    other.load_state_dict(linear.state_dict())
    assert_bits_equal(other(x), expected)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.float16)], ids="hft")
@pytest.mark.parametrize("prepared", [False, True], ids=["stored", "prepared"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_casts_reach_the_bias_alone(scheme: str, prepared: bool, cast: object) -> None:
    linear = make_linear(scheme)
    if prepared:
        linear.prepare(CPU)
    before = linear.stored()
    cast(linear)  # type: ignore[operator]
    assert linear.bias is not None
    assert linear.bias.dtype in (torch.float16, torch.float32)
    for role, tensor in linear.stored().items():
        assert_bits_equal(tensor, before[role])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_work_like_the_original(copied: object) -> None:
    linear = make_linear("mxfp4-aiter")
    x = activations(2, K)
    expected = linear(x)
    assert_bits_equal(copied(linear)(x), expected)  # type: ignore[operator]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_weight_says_what_it_is_and_takes_no_memory(scheme: str) -> None:
    linear = make_linear(scheme)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        linear.to(dtype)
        assert (linear.weight.shape, linear.weight.dtype, linear.weight.device) == ((N, K), dtype, CPU)
        assert (linear.weight.data.shape, linear.weight.is_floating_point(), linear.weight.numel()) == (
            (N, K),
            True,
            N * K,
        )
        linear.prepare(CPU)
    assert linear.weight.stride() == (0, 0)  # one element
    assert "weight" not in dict(linear.named_parameters())
    assert repr(linear.weight) == "WeightPlaceholder([288, 256], dtype=torch.float32, device=cpu)"


def _merge(weight: Tensor) -> None:
    weight.data += 1


@pytest.mark.parametrize(
    "use",
    [
        _merge,
        Tensor.clone,
        Tensor.sum,
        Tensor.float,
        nn.init.normal_,
        lambda weight: weight[0, 0],
        lambda weight: torch.cat([weight.data, weight.data]),
        lambda weight: torch.ones(1, K) @ weight.t(),
        lambda weight: setattr(weight, "data", torch.zeros(N, K)),
        lambda weight: F.linear(torch.ones(1, K), weight),
        np.asarray,
    ],
    ids=["merge", "clone", "sum", "cast", "init", "item", "cat", "matmul", "set", "linear", "numpy"],
)
@pytest.mark.parametrize("prepared", [False, True], ids=["stored", "prepared"])
def test_its_weight_can_not_be_taken_for_numbers(use: Callable[[Tensor], object], prepared: bool) -> None:
    linear = make_linear("fp8-tensor")
    if prepared:
        linear.prepare(CPU)
    with pytest.raises(UsageError, match="no numbers to read or to change"):
        use(linear.weight)


def test_a_layer_that_asks_for_its_dtype_compiles_whole() -> None:
    """As T5's feed-forward does."""
    linear = make_linear("mxfp4-aiter")

    def forward(x: Tensor) -> Tensor:
        return linear(x.to(linear.weight.dtype))

    x = activations(4, K, dtype=torch.float32)
    expected = forward(x)
    assert expected.dtype == torch.bfloat16
    assert_bits_equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), expected)


def test_a_backend_that_used_the_tensors_up_can_not_be_saved() -> None:
    linear = make_linear("mxfp4-aiter", backend="dequantize")
    linear.prepare(CPU)
    with pytest.raises(BackendError, match=rf"{MODULE}: backend dequantize keeps no copy.*copy its folder"):
        linear.state_dict()


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    linear = make_linear("mxfp4-aiter", backend="cutlass")
    with pytest.raises(UsageError, match=r"no backend 'cutlass'.*reference"):
        linear.prepare(CPU)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_compile_takes_it_whole(scheme: str) -> None:
    linear = make_linear(scheme)
    x = activations(4, K)
    expected = linear(x)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_bits_equal(compiled(x), expected)


def test_a_backend_without_a_gradient_says_so_instead_of_losing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("run_ckpt.loading.linear.describe_device", lambda device: Device("cuda", "sm90"))
    linear = make_linear("fp8-tensor", backend="scaled_mm")
    x = activations(4, K).requires_grad_()
    with pytest.raises(BackendError, match=rf'{MODULE}: backend scaled_mm gives no gradient .* backend="reference"'):
        linear(x)
    with torch.no_grad():
        assert linear(x).shape == (4, N)


def named(module: str) -> Layer:
    layer = describe_layer("mxfp4-aiter", N, K)
    return replace(layer, module=module, tensors={role: f"{module}.{role}" for role in layer.tensors})


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, N, device="meta")
        self.norm = nn.LayerNorm(N, device="meta")
        self.blocks = nn.Sequential(nn.Linear(K, N, bias=False, device="meta"))


def test_replace_keeps_bias_and_neighbours() -> None:
    model = Pair()
    bias = model.first.bias
    layers = {name: named(name) for name in ("first", "blocks.0")}
    replaced = replace_linears(model, layers)
    assert model.first is replaced["first"]
    assert model.blocks[0] is replaced["blocks.0"]
    assert replaced["first"].bias is bias
    assert replaced["blocks.0"].bias is None


def test_replace_names_all_that_does_not_fit_and_changes_nothing() -> None:
    model = Pair()
    model.blocks[0] = nn.Linear(K, N + 32, device="meta")
    names = ("first", "blocks.0", "norm", "gone")
    with pytest.raises(FaultsError) as caught:
        replace_linears(model, {name: named(name) for name in names})
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["blocks.0", "norm", "gone"]
    assert isinstance(model.first, nn.Linear)


def test_a_prepared_layer_says_what_runs_it() -> None:
    linear = make_linear("fp8-block")
    linear.prepare(CPU)
    assert (
        repr(linear)
        == "QuantizedLinear(in_features=256, out_features=288, bias=True, fp8, layout=plain, backend=reference,"
        " activations=bf16)"
    )
