"""gpt-oss: the MXFP4 of its experts is written as OpenAI's own checkpoints have it, and passed through."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from run_ckpt import FaultsError, UsageError, load_quantized
from run_ckpt.contract.codec import dequantize as decode
from run_ckpt.contract.codec import quantize
from run_ckpt.contract.formats import PLAIN_MXFP4
from run_ckpt.contract.kept import kept_groups
from run_ckpt.integrations.transformers import register
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.bench import bench_component
from run_ckpt.tools.explain import explain
from run_ckpt.tools.publish.rows import read_result
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.rewrite.relayout import relayout
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


@pytest.fixture(scope="module")
def foreign(converted: Path) -> Path:
    """What OpenAI publishes: the result without its manifest."""
    folder = converted.parent / "foreign"
    folder.mkdir()
    for path in converted.iterdir():
        if path.name != "quantization_manifest.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


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


def test_codes_of_a_source_are_passed_through(converted: Path, foreign: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("folder", ["converted", "foreign"])
@pytest.mark.parametrize("backend", ["reference", "dequantize"])
def test_our_loader_runs_the_rounded_source(
    source: Path, folder: str, backend: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    loaded = load_quantized(path, dtype=torch.float32, backend=backend)
    expected = GptOssForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.testing.assert_close(run_logits(loaded), run_logits(expected), rtol=1e-5, atol=1e-5)
    stored = load_all(source)
    for leaf in ("gate_up_proj", "down_proj"):
        weights = rounded(stored[f"{EXPERTS}.{leaf}"])
        for number, weight in enumerate(weights):
            linear: Any = loaded.get_submodule(f"{EXPERTS}.{number}.{leaf}")
            assert linear.backend == backend
            assert_bits_equal(linear(torch.eye(linear.layer.K)) - linear.bias, (weight + linear.bias) - linear.bias)


def test_biases_of_other_experts_are_a_fault(foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    tensors = load_all(folder)
    tensors[f"{EXPERTS}.down_proj_bias"] = tensors[f"{EXPERTS}.down_proj_bias"][:3].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FaultsError, match=r"down_proj_bias: in the checkpoint, but the model has no use for it"):
        load_quantized(folder)


def test_what_our_loader_saves_is_the_result(converted: Path, tmp_path: Path) -> None:
    loaded: Any = load_quantized(converted)
    loaded.save_pretrained(tmp_path / "saved")
    saved = load_all(tmp_path / "saved")
    stored = load_all(converted)
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_bits_equal(saved[name], tensor)
    assert run_logits(GptOssForCausalLM.from_pretrained(tmp_path / "saved")).isfinite().all()


@pytest.mark.usefixtures("own_tables")
def test_transformers_keeps_its_own_way_beside_our_plug_in(converted: Path) -> None:
    register()
    model = GptOssForCausalLM.from_pretrained(converted)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert_bits_equal(run_logits(model), run_logits(GptOssForCausalLM.from_pretrained(converted)))


@pytest.mark.parametrize(("layout", "dialect"), [("aiter", None), ("plain", None), ("plain", "quark")])
def test_relayout_is_refused(converted: Path, tmp_path: Path, layout: str, dialect: str | None) -> None:
    with pytest.raises(UsageError, match="nobody reads in another layout or dialect than gpt-oss"):
        relayout(converted, tmp_path / "out", layout=layout, dialect=dialect, progress=Silent())


def test_no_option_is_offered_that_would_be_refused(converted: Path) -> None:
    assert {group.remedy for group in kept_groups(read_manifest(converted))} == {""}
    (found,) = explain(read_result(converted), f"{EXPERTS}.down_proj")
    assert found.changes == ("nothing does: a GptOssForCausalLM is read with all experts in this format alone",)


def test_bench_times_the_layers_of_single_experts(foreign: Path) -> None:
    say: list[str] = []
    found = bench_component(foreign, device="cpu", backend=None, rows=(1,), dtype=torch.float32, say=say.append)
    assert [(row.N, row.K, row.count) for row in found.layers] == [(256, 512, 8), (1024, 256, 8)]
    assert found.load is not None
