"""load_quantized: strict about everything, sparing with memory, and for other tools' checkpoints too."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from run_ckpt import load_quantized
from run_ckpt.contract.errors import CheckpointError, FaultsError, ManifestError
from run_ckpt.contract.formats import FP8
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.tools.bench import bench_component
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, random_weight, save_checkpoint
from tests.converted import FLUX_DIGITS, SCHEMES, edit_json, edit_manifest, reseal

N, K = 256, 512


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, N)
        self.down = nn.Linear(N, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """A model of the user's own: two linear layers to quantize, a norm and an embedding tied to a head."""

    def __init__(self, *, width: int = K, extra: bool = False, buffer: bool = False):
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.blocks = nn.ModuleList([Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight
        if extra:
            self.gate = nn.Linear(width, N)
        if buffer:
            self.register_buffer("freqs", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.blocks[0](x))  # type: ignore[no-any-return]


def meta(**options: Any) -> Net:
    with torch.device("meta"):
        return Net(**options)


def net_tensors() -> dict[str, Tensor]:
    return {
        "blocks.0.up.weight": random_weight(N, K, seed=1),
        "blocks.0.up.bias": torch.linspace(-1, 1, N).bfloat16(),
        "blocks.0.down.weight": random_weight(K, N, seed=2),
        "norm.weight": torch.ones(K, dtype=torch.bfloat16),
        "norm.bias": torch.zeros(K, dtype=torch.bfloat16),
        "embed.weight": random_weight(8, K, seed=3),
    }


def convert_net(folder: Path, tensors: dict[str, Tensor] | None = None, **options: str) -> Path:
    save_checkpoint(folder / "source", [tensors or net_tensors()], {"architectures": ["Net"], "model_type": "net"})
    convert(folder / "source", folder / "out", **options)
    return folder / "out"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return convert_net(tmp_path, format="mxfp4")


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_fills_a_model_of_the_users_own(tmp_path: Path, scheme: dict[str, str]) -> None:
    out = convert_net(tmp_path, **scheme)
    model = load_quantized(out, model=meta())
    assert not model.training
    assert isinstance(model.blocks[0].up, QuantizedLinear)
    stored, state = load_all(out), model.state_dict()
    assert state.pop("head.weight").data_ptr() == model.embed.weight.data_ptr()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_bits_equal(state[name], tensor)
    assert model(torch.ones(1, K, dtype=torch.bfloat16)).isfinite().all()


def test_says_in_one_line_what_was_loaded(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="run_ckpt"):
        load_quantized(out, model=meta())
    assert len(caplog.messages) == 1
    assert "2 mxfp4 layers on reference" in caplog.messages[0]


def test_dtype_is_given_to_what_is_not_quantized(out: Path) -> None:
    model = load_quantized(out, model=meta(), dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.blocks[0].up.stored()["weight"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"extra": True}, r"gate\.weight: the model wants it, the checkpoint lacks it"),
        ({"width": K + 256}, r"blocks.0.up: is \[256, 768\] in the model, \[256, 512\] in the checkpoint"),
    ],
    ids=["model-wants-more", "model-is-wider"],
)
def test_another_model_is_refused(out: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(FaultsError, match=says):
        load_quantized(out, model=meta(**options))


def test_a_tensor_that_the_model_has_no_use_for_is_refused(tmp_path: Path) -> None:
    out = convert_net(tmp_path, net_tensors() | {"gate.bias": torch.ones(4)}, format="mxfp4")
    with pytest.raises(FaultsError, match=r"gate\.bias: in the checkpoint, but the model has no use for it"):
        load_quantized(out, model=meta())


def test_a_misshapen_kept_tensor_is_refused(tmp_path: Path) -> None:
    out = convert_net(tmp_path, net_tensors() | {"norm.bias": torch.zeros(1, dtype=torch.bfloat16)}, format="mxfp4")
    with pytest.raises(FaultsError, match=r"norm\.bias: is BF16 \[1\], the model wants .* \[512\]"):
        load_quantized(out, model=meta())


def test_tied_tensors_must_agree(tmp_path: Path) -> None:
    twice = net_tensors() | {"head.weight": random_weight(8, K, seed=3)}
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    load_quantized(convert_net(tmp_path / "same", twice, format="mxfp4"), model=meta())
    twice["head.weight"] = -twice["head.weight"]
    with pytest.raises(CheckpointError, match=r"embed\.weight and head\.weight are one tensor .* but differ"):
        load_quantized(convert_net(tmp_path / "other", twice, format="mxfp4"), model=meta())


def test_a_buffer_that_no_checkpoint_holds_may_not_stay_empty(out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"freqs are on the meta device.*include_buffers=False"):
        load_quantized(out, model=meta(buffer=True))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-manifest": (lambda out: (out / MANIFEST_NAME).unlink(), "lacks its quantization_manifest.json"),
    "schema-version": (lambda out: edit_manifest(out, lambda m: m.update(schema_version=9)), "schema version 9"),
    "layout": (
        lambda out: edit_manifest(out, lambda m: m["layers"]["blocks.0.up"].update(layout="plain")),
        "layer blocks.0.up",
    ),
    "scale-shape": (
        lambda out: edit_manifest(out, lambda m: m["layers"]["blocks.0.up"].update(scale_shape=[256, 9])),
        "layer blocks.0.up",
    ),
    "config": (
        lambda out: edit_json(out / "config.json", lambda c: c["quantization_config"].update(layout="plain")),
        "config.json",
    ),
    "longer-shard": (lambda out: (out / "model.safetensors").open("ab").write(b"\0"), "model.safetensors"),
}


@pytest.mark.parametrize(("damage", "says"), FAULTS.values(), ids=FAULTS)
def test_a_checkpoint_that_contradicts_itself_is_refused(
    out: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(out)
    with pytest.raises(CheckpointError, match=says):
        load_quantized(out, model=meta())


def rewrite_shard(out: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    reseal(out)


def test_fp8_alone_in_our_own_dialect_loads(tmp_path: Path) -> None:
    out = convert_net(tmp_path, format="fp8", dialect="mxfp4")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["layout"] == "plain"
    linear = load_quantized(out, model=meta()).blocks[0].up
    assert linear.layer.format == FP8
    assert_bits_equal(linear.stored()["weight"], load_file(out / "model.safetensors")["blocks.0.up.weight"])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("blocks.0.up.weight_scale"), r"blocks\.0\.up\.weight_scale: the manifest lists it"),
        (lambda t: t.pop("blocks.0.up.weight"), r"blocks\.0\.up\.weight: the manifest lists it"),
        (lambda t: t.pop("norm.weight"), r"norm\.weight: the manifest lists it"),
        (lambda t: t.update({"new.weight_scale": torch.ones(1)}), r"new\.weight_scale: not in the manifest"),
        (
            lambda t: t.update({"blocks.0.up.weight_scale": t["blocks.0.up.weight_scale"][:128].clone()}),
            r"blocks\.0\.up\.weight_scale: is U8 \[128",
        ),
    ],
    ids=["weight-without-scale", "scale-without-weight", "missing", "unused", "misshapen"],
)
def test_shards_that_do_not_hold_what_the_manifest_says_are_refused(out: Path, edit: Any, says: str) -> None:
    rewrite_shard(out, edit)
    with pytest.raises(FaultsError, match=says):
        load_quantized(out, model=meta())


def test_a_flipped_byte_anywhere_in_the_manifest_is_refused(out: Path) -> None:
    path = out / MANIFEST_NAME
    data = path.read_bytes()
    for position in range(0, len(data), 37):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ManifestError):
            load_quantized(out, model=meta())


def test_a_flipped_byte_anywhere_in_a_header_is_refused(out: Path) -> None:
    path = out / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for position in range(0, end, 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError):
            load_quantized(out, model=meta())


def test_the_folder_of_a_pipeline_is_told_from_a_component(tmp_path: Path) -> None:
    convert_net(tmp_path, format="mxfp4").rename(tmp_path / "transformer")
    with pytest.raises(CheckpointError, match=r"holds transformer\. Load one of them: .*/transformer"):
        load_quantized(tmp_path)


def test_a_missing_index_is_noticed(tmp_path: Path) -> None:
    tensors = net_tensors()
    first = {name: tensors.pop(name) for name in ("blocks.0.up.weight", "blocks.0.up.bias")}
    save_checkpoint(tmp_path / "source", [first, tensors], {"architectures": ["Net"], "model_type": "net"})
    convert(tmp_path / "source", tmp_path / "out", format="mxfp4")
    load_quantized(tmp_path / "out", model=meta())
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    with pytest.raises(FaultsError, match=r"model\.safetensors\.index\.json: missing"):
        load_quantized(tmp_path / "out", model=meta())


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
_MODELING = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


def convert_llama(folder: Path, **config: object) -> Path:
    """Convert a small Llama whose config.json says more than it should."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_checkpoint(folder / "source", [tensors], {**LLAMA, **config})
    convert(folder / "source", folder / "out", format="mxfp4")
    return folder / "out"


@pytest.mark.parametrize(
    "choice",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation_internal": "owner/kernel@main:name"},
        {"attn_implementation": {"": "owner/kernel"}},
        {"attn_implementation": "flash_attention_2"},
        {"experts_implementation": "owner/kernel"},
    ],
    ids=str,
)
def test_a_checkpoint_does_not_choose_the_code_that_runs(
    tmp_path: Path, choice: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    # transformers would import what fetches kernels, which is not installed here.
    model: Any = load_quantized(convert_llama(tmp_path, **choice))
    assert model.config._attn_implementation == "sdpa"
    assert "is left out: a checkpoint does not choose the code that runs" in caplog.text


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    out = convert_llama(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"})
    (out / "modeling.py").write_text(_MODELING)
    model = load_quantized(out)
    assert type(model) is transformers.LlamaForCausalLM
    assert not (out / "ran").exists()


def test_a_class_nobody_knows_asks_for_the_model(out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'Net' is no model of transformers .* pass model="):
        load_quantized(out)


def test_a_folder_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable quantization_config"):
        load_quantized(FLUX_DIGITS)


# Other tools' checkpoints: the same tensors, without our manifest.


def as_foreign(out: Path, **config: Any) -> Path:
    """Make the folder what another tool would have left: no manifest, no private key."""
    (out / MANIFEST_NAME).unlink()

    def strip(document: dict[str, Any]) -> None:
        document["quantization_config"].pop("convert_ckpt")
        document["quantization_config"].update(config)

    edit_json(out / "config.json", strip)
    return out


FOREIGN = {
    "quark-mxfp4": {"format": "mxfp4", "layout": "plain", "dialect": "quark"},
    "quark-fp8": {"format": "fp8", "dialect": "quark"},
    "mxfp4-pack-quantized": {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"},
    "float-quantized-tensor": {"format": "fp8", "granularity": "tensor", "dialect": "compressed-tensors"},
    "float-quantized-channel": {"format": "fp8", "granularity": "channel", "dialect": "compressed-tensors"},
}


@pytest.mark.parametrize("options", FOREIGN.values(), ids=FOREIGN)
def test_other_tools_checkpoints_load_through_the_same_layers(tmp_path: Path, options: dict[str, str]) -> None:
    out = convert_net(tmp_path, **options)
    x = torch.ones(2, K, dtype=torch.bfloat16)
    expected = load_quantized(out, model=meta())(x)
    assert_bits_equal(load_quantized(as_foreign(out), model=meta())(x), expected)


def quark_with_scalar_scales(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """amd-quark 0.13 writes FP8 scales as BF16 scalars, with a static input_scale."""
    out = as_foreign(convert_net(folder, format="fp8", dialect="quark"))
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name].bfloat16().reshape(())
        tensors[name.replace("weight_scale", "input_scale")] = torch.tensor(0.5, dtype=torch.bfloat16)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out, tensors


def test_quarks_own_scalar_scales_in_bf16_are_read(tmp_path: Path) -> None:
    out, tensors = quark_with_scalar_scales(tmp_path)
    model = load_quantized(out, model=meta())
    scale = model.blocks[0].up.stored()["weight_scale"]
    assert_bits_equal(scale, tensors["blocks.0.up.weight_scale"].float().reshape(1))
    assert_bits_equal(model.blocks[0].up.stored()["input_scale"], torch.tensor([0.5]))


def test_bench_reads_quarks_own_scales(tmp_path: Path) -> None:
    out, _ = quark_with_scalar_scales(tmp_path)
    measured = bench_component(out, device="cpu", backend=None, rows=(1,), dtype=torch.bfloat16, say=lambda text: None)
    assert {(row.N, row.K) for row in measured.layers} == {(N, K), (K, N)}


def test_a_damaged_private_key_is_refused(tmp_path: Path) -> None:
    out = convert_net(tmp_path, format="fp8")
    (out / MANIFEST_NAME).unlink()
    edit_json(out / "config.json", lambda config: config["quantization_config"].update(convert_ckpt=5))
    with pytest.raises(CheckpointError, match="convert_ckpt is not an object"):
        load_quantized(out, model=meta())


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("blocks.0.up.weight_scale"), r"blocks\.0\.up\.weight: 0 weight scales beside it"),
        (lambda t: t.pop("blocks.0.up.weight"), r"blocks\.0\.up\.weight_scale: a scale without a quantized weight"),
        (
            lambda t: t.update({"blocks.0.up.weight_scale": torch.zeros(N, 3, dtype=torch.uint8)}),
            r"blocks\.0\.up\.weight: .* is no MXFP4",
        ),
        (
            lambda t: t.update({"blocks.0.up.weight_scale": torch.ones(N, K // 16)}),
            r"blocks\.0\.up\.weight: .* is no MXFP4",
        ),
    ],
    ids=["weight-without-scale", "scale-without-weight", "misshapen-scale", "another-block-size"],
)
def test_other_tools_checkpoints_are_refused_where_weight_and_scale_part(tmp_path: Path, edit: Any, says: str) -> None:
    out = as_foreign(convert_net(tmp_path, **FOREIGN["quark-mxfp4"]))
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(FaultsError, match=says):
        load_quantized(out, model=meta())


def test_an_unknown_quant_method_is_refused(tmp_path: Path) -> None:
    out = as_foreign(convert_net(tmp_path, **FOREIGN["quark-mxfp4"]), quant_method="gptq")
    with pytest.raises(CheckpointError, match=r"quant_method 'gptq' is none that is read here: mxfp4, fp8"):
        load_quantized(out, model=meta())


_MEASURE = """
import sys
from pathlib import Path
import torch
from torch import nn
from run_ckpt import load_quantized
with torch.device("meta"):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8192, 16384, bias=False))])
from run_ckpt.tools.memory import peak_nbytes
before = peak_nbytes("cpu")
load_quantized(Path(sys.argv[1]), model=model)
tensors = [tensor.clone() for tensor in model.buffers()]
assert len(tensors) == 2
print(peak_nbytes("cpu") - before)
"""


def test_host_memory_holds_the_model_once_and_little_more(tmp_path: Path) -> None:
    source = save_checkpoint(
        tmp_path / "source",
        [{"blocks.0.0.weight": random_weight(128, 8192).repeat(128, 1)}],
        {"architectures": ["Net"]},
    )
    convert(source, tmp_path / "out", format="mxfp4")
    nbytes = (tmp_path / "out" / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    # The clones take the size once; what is mapped and was read to make them, once more.
    assert nbytes < int(done.stdout) < 2 * nbytes + 64 * 2**20


def test_config_json_is_not_needed_where_the_model_is_given(tmp_path: Path) -> None:
    out = convert_net(tmp_path, format="fp8")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert load_quantized(out, model=meta()).blocks[0].up.layer.format == FP8
