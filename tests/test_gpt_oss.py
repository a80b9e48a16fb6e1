"""gpt-oss: the MXFP4 of its experts is written as OpenAI's own checkpoints have it, and passed through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from run_ckpt import CheckpointError, FaultsError, UsageError, load_quantized
from run_ckpt.contract.codec import dequantize as decode
from run_ckpt.contract.codec import quantize
from run_ckpt.contract.formats import PLAIN_MXFP4
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import load_all
from tests.converted import convert
from tests.experts import run_logits, save_experts

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts("gpt-oss", tmp_path_factory.mktemp("gpt-oss") / "bf16")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    return convert(source, source.parent / "out", format="mxfp4")


def rounded(stored: Tensor) -> Tensor:
    """Return experts [experts, K, N] as MXFP4 along K holds them."""
    weights = stored.mT.contiguous().float()
    parts = [quantize(weight, PLAIN_MXFP4, "even") for weight in weights]
    return torch.stack([decode(codes, scales, PLAIN_MXFP4) for codes, scales, *_ in parts]).mT.contiguous()


def test_names_and_shapes_are_those_of_openai(converted: Path) -> None:
    tensors = load_all(converted)
    shapes = {name.removeprefix(EXPERTS): tuple(t.shape) for name, t in tensors.items() if name.startswith(EXPERTS)}
    assert shapes == {
        ".gate_up_proj_blocks": (4, 1024, 8, 16),
        ".gate_up_proj_scales": (4, 1024, 8),
        ".gate_up_proj_bias": (4, 1024),
        ".down_proj_blocks": (4, 256, 16, 16),
        ".down_proj_scales": (4, 256, 16),
        ".down_proj_bias": (4, 256),
    }
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(("_blocks", "_scales"))} == {torch.uint8}


def test_transformers_by_itself_decodes_the_rounded_source(source: Path, converted: Path) -> None:
    stored = load_all(source)
    model = GptOssForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    for leaf in ("gate_up_proj", "down_proj"):
        found = model.get_parameter(f"{EXPERTS}.{leaf}").data
        assert_bits_equal(found.contiguous(), rounded(stored[f"{EXPERTS}.{leaf}"]).bfloat16())


def test_dequantize_writes_what_transformers_loads(converted: Path, tmp_path: Path) -> None:
    dequantize(converted, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain, found = GptOssForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not found["missing_keys"]
    assert_bits_equal(run_logits(plain), run_logits(GptOssForCausalLM.from_pretrained(converted)))


def test_slabs_that_reach_over_experts_give_the_same_bytes(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert_ckpt.run.schedule.SLAB_NBYTES", 200_000)
    again = load_all(convert(source, tmp_path / "out", format="mxfp4"))
    for name, tensor in load_all(converted).items():
        assert_bits_equal(again[name], tensor)
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert report.faults == ()
    assert len(report.measured) == 4


def test_codes_of_a_source_are_passed_through(converted: Path, tmp_path: Path) -> None:
    # Without its manifest it is what OpenAI publishes.
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in converted.iterdir():
        if path.name != "quantization_manifest.json":
            (foreign / path.name).write_bytes(path.read_bytes())
    out = convert(foreign, tmp_path / "out", format="mxfp4")
    passed = load_all(out)
    for name, tensor in load_all(converted).items():
        assert_bits_equal(passed[name], tensor)
    assert read_manifest(out).source["quantized"]["weights"] == {"mxfp4 passed through": 4}
    (report,) = verify_output(out, foreign, Silent())
    assert report.faults == ()


@pytest.mark.parametrize(
    "options", [{"format": "fp8"}, {"format": "mxfp4", "layout": "aiter"}, {"format": "mxfp4", "dialect": "quark"}]
)
def test_what_no_server_reads_is_refused(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"gpt-oss: servers read .* and nothing else"):
        convert(source, tmp_path / "out", **options)


def test_some_experts_alone_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match=r"layers\.1\.mlp\.experts\.down_proj: is kept .*, but all experts"):
        convert(source, tmp_path / "out", format="mxfp4", ignore=("*.1.mlp.experts.*",))


def test_the_layers_beside_experts_stay(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "*.q_proj"\nformat = "mxfp4"\n')
    out = convert(source, tmp_path / "out", format="mxfp4", recipe=recipe)
    assert all(layer.n_stacked == 4 for layer in read_manifest(out).layers.values())


def test_our_loader_says_who_loads_it(converted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"its experts are stacked .* vLLM, SGLang and transformers read them"):
        load_quantized(converted)
