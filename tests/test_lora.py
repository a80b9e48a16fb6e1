"""LoRA beside quantized layers, by diffusers' and peft's own functions: exactly as beside the decoded weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from run_ckpt import load_quantized
from run_ckpt.contract.errors import UsageError
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.progress import Silent
from run_ckpt.tools.rewrite.dequantize import dequantize
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all
from tests.models import MODELS, run, save

FLUX = MODELS["flux1"]
RANK = 4
# Quantized and kept layers, of both kinds of block and outside of them.
TARGETS = (
    "x_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    "single_transformer_blocks.1.attn.to_v",
    "single_transformer_blocks.1.proj_out",
)


@pytest.fixture(scope="module", params=["mxfp4", "fp8"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A converted FLUX.1, and the same weights decoded to BF16."""
    root = tmp_path_factory.mktemp("lora")
    save(FLUX, FLUX.build(), root / "source")
    convert(root / "source", root / "out", format=request.param)
    dequantize(root / "out", root / "plain", dtype="bfloat16", progress=Silent())
    return root / "out", root / "plain"


@pytest.fixture
def registered(own_tables: None) -> None:
    import run_ckpt.integrations.diffusers

    run_ckpt.integrations.diffusers.register()


def make_pipeline(transformer: nn.Module) -> FluxPipeline:
    others = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **dict.fromkeys(others))


def from_pretrained(folder: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def random_lora(transformer: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return a LoRA as diffusers saves it: A [rank, K] and B [N, rank]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in TARGETS:
        linear = transformer.get_submodule(name)
        sizes = {"lora_A": (RANK, linear.in_features), "lora_B": (linear.out_features, RANK)}
        for part, size in sizes.items():
            tensors[f"transformer.{name}.{part}.weight"] = (torch.randn(size, generator=generator) * 0.1).bfloat16()
    return tensors


def assert_state_is_that_on_disk(model: nn.Module, out: Path) -> None:
    stored, state = load_all(out), model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_bits_equal(state[name], tensor)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("load", [load_quantized, from_pretrained], ids=["load_quantized", "from_pretrained"])
def test_a_lora_of_diffusers_does_what_it_does_to_the_decoded_model(
    folders: tuple[Path, Path], load: Callable[[Path], Any]
) -> None:
    out, plain = folders
    quantized, decoded = load(out), from_pretrained(plain)
    assert any(isinstance(quantized.get_submodule(name), QuantizedLinear) for name in TARGETS)
    assert not all(isinstance(quantized.get_submodule(name), QuantizedLinear) for name in TARGETS)
    models = (quantized, decoded)
    pipelines = [make_pipeline(model) for model in models]
    before = run(FLUX, decoded)

    def outputs() -> Tensor:
        ours, theirs = (run(FLUX, model) for model in models)
        assert_bits_equal(ours, theirs)
        return ours

    assert_bits_equal(outputs(), before)
    for pipeline in pipelines:
        pipeline.load_lora_weights(random_lora(decoded, seed=1), adapter_name="first")
    with_first = outputs()
    assert not torch.equal(with_first, before)
    for pipeline in pipelines:
        pipeline.load_lora_weights(random_lora(pipeline.transformer, seed=2), adapter_name="second")
        pipeline.set_adapters(["first", "second"], adapter_weights=[0.5, 2.0])
    assert not torch.equal(outputs(), with_first)
    for pipeline in pipelines:
        pipeline.disable_lora()
    assert_bits_equal(outputs(), before)
    for pipeline in pipelines:
        pipeline.enable_lora()
        pipeline.delete_adapters("second")
        pipeline.set_adapters("first")
    assert_bits_equal(outputs(), with_first)
    for pipeline in pipelines:
        pipeline.unload_lora_weights()
    assert_bits_equal(outputs(), before)
    assert_state_is_that_on_disk(quantized, out)


def test_an_adapter_of_peft_is_put_beside_and_taken_away(folders: tuple[Path, Path]) -> None:
    out, plain = folders
    models = (load_quantized(out), from_pretrained(plain))
    outputs = []
    for model in models:
        torch.manual_seed(5)
        model.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "to_out.0", "proj_mlp"], init_lora_weights=False))
        outputs.append(run(FLUX, model))
    assert_bits_equal(*outputs)
    layer = models[0].transformer_blocks[0].attn.to_q
    assert {p.dtype for p in layer.lora_A.parameters()} == {torch.bfloat16}
    models[0].delete_adapters("default")
    assert_bits_equal(run(FLUX, models[0]), run(FLUX, load_quantized(out)))


@pytest.mark.parametrize("backend", ["reference", "dequantize"])
def test_an_adapter_is_trained_as_beside_the_decoded_weights(folders: tuple[Path, Path], backend: str) -> None:
    out, plain = folders
    gradients = []
    for model in (load_quantized(out, backend=backend), from_pretrained(plain).requires_grad_(False)):
        torch.manual_seed(5)
        model.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "to_out.0", "proj_mlp"], init_lora_weights=False))
        model(**FLUX.inputs(), return_dict=False)[0].float().square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.any()
        assert_bits_equal(ours[name], gradient)


@pytest.mark.parametrize("safe", [False, True], ids=["in-place", "safe"])
def test_fusing_a_lora_is_refused_and_changes_nothing(folders: tuple[Path, Path], safe: bool) -> None:
    out, _ = folders
    model = load_quantized(out)
    pipeline = make_pipeline(model)
    before = run(FLUX, model)
    pipeline.load_lora_weights(random_lora(model, seed=1))
    with_lora = run(FLUX, model)
    with pytest.raises(UsageError, match=r"fuse_lora: .* run-ckpt dequantize"):
        pipeline.fuse_lora(safe_fusing=safe)
    with pytest.raises(UsageError, match="no numbers to read or to change"):
        model.transformer_blocks[0].attn.to_q.merge(safe_merge=safe)
    assert_bits_equal(run(FLUX, model), with_lora)
    pipeline.unload_lora_weights()
    assert_bits_equal(run(FLUX, model), before)
    assert_state_is_that_on_disk(model, out)


def test_what_needs_the_weights_numbers_is_refused(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(UsageError, match="no numbers to read or to change"):
            load_quantized(out).add_adapter(LoraConfig(r=RANK, target_modules=["to_q"], **options))
    with pytest.raises(UsageError, match="no numbers to read or to change"):
        load_quantized(out).fuse_qkv_projections()
