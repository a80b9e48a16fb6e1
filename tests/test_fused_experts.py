"""Experts that a source holds in 3-D tensors are converted as if each had its own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert_ckpt.options import Options
from convert_ckpt.plan.make_plan import make_plan
from convert_ckpt.run.schedule import list_slabs
from convert_ckpt.source.component import open_component
from run_ckpt import load_quantized
from run_ckpt.contract.errors import ManifestError
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import load_all, random_weight, save_checkpoint
from tests.converted import convert, edit_manifest
from tests.experts import BUILDERS, FUSED, run_logits, save_experts

E, HIDDEN, INNER = 3, 256, 384
BLOCK = "model.layers.0.mlp"
BLOCKS = {"qwen3-vl-moe": "model.language_model.layers", "llama4": "model.layers"}
EXPERTS = {"qwen3-vl-moe": "mlp.experts", "llama4": "feed_forward.experts"}
CONFIG: dict[str, object] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
SCHEMES: dict[str, dict[str, Any]] = {
    "mxfp4": {"format": "mxfp4", "layout": "plain", "dialect": "quark"},
    "nvfp4": {"format": "nvfp4"},
    "fp8-tensor": {"format": "fp8", "granularity": "tensor"},
    "fp8-channel": {"format": "fp8", "granularity": "channel"},
    "fp8-block": {"format": "fp8", "granularity": "block"},
    "kept": {"format": "fp8", "ignore": ("*.experts.1.*",)},
}


def separate(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return the weights of all experts, and a router."""
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    weights = {
        f"{BLOCK}.experts.{expert}.{name}.weight": random_weight(*shape, dtype, seed=7 * expert + i)
        for expert in range(E)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {**weights, f"{BLOCK}.gate.weight": random_weight(E, HIDDEN, dtype)}


def fuse(weights: dict[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
    """Return them as they are in a checkpoint with fused experts."""
    of = [[weights[f"{BLOCK}.experts.{i}.{name}_proj.weight"] for name in ("gate", "up", "down")] for i in range(E)]
    gate_up = torch.stack([torch.cat((gate, up)) for gate, up, _ in of])
    down = torch.stack([down for *_, down in of])
    if transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    kept = {name: weight for name, weight in weights.items() if ".experts." not in name}
    return {**kept, f"{BLOCK}.experts.gate_up_proj": gate_up, f"{BLOCK}.experts.down_proj": down}


@pytest.fixture(params=[False, True], ids=["stored", "transposed"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The same model with experts one by one, and fused."""
    weights = separate()
    save_checkpoint(tmp_path / "separate", [weights], CONFIG)
    save_checkpoint(tmp_path / "fused", [fuse(weights, transposed=request.param)], CONFIG)
    return tmp_path / "separate", tmp_path / "fused"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fused_experts_give_the_bytes_of_separate_ones(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    # Several slabs a weight, whose ends are none of a row.
    monkeypatch.setattr("convert_ckpt.run.schedule.SLAB_NBYTES", 40_000)
    outputs = [convert(source, tmp_path / f"{source.name}-out", **SCHEMES[scheme]) for source in sources]
    expected, found = (load_all(output) for output in outputs)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_bits_equal(tensor, expected[name])
    (report,) = verify_output(outputs[1], sources[1], Silent())
    assert report.faults == ()
    assert len(report.measured) == len(report.sqnr_db) > 0


def test_weights_of_16_and_32_bits_are_read_transposed(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        weights = separate(dtype)
        source = tmp_path / f"{dtype}-fused"
        save_checkpoint(source, [fuse(weights, transposed=True)], CONFIG)
        out = convert(source, tmp_path / f"{dtype}-out", format="fp8", ignore=("*.experts.0.*",))
        found = load_all(out)
        for name in weights:
            if ".experts.0." in name:
                assert_bits_equal(found[name], weights[name])


def test_a_shard_is_hashed_in_order_though_columns_are_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "fused", [fuse(separate(), transposed=True)], CONFIG)
    component = open_component(tmp_path / "fused")
    hashed = [
        slab
        for slab in list_slabs(make_plan(component, Options("fp8", granularity="block")), ())
        if slab.hash_order is not None
    ]
    assert [slab.hash_order for slab in hashed] == list(range(len(hashed)))
    (shard,) = component.folder.shards
    at = shard.header.file_nbytes - sum(slab.nbytes for slab in hashed)
    for slab in hashed:
        assert slab.offset == at
        at += slab.nbytes


def test_what_is_no_pair_of_experts_stays_as_it_is(tmp_path: Path) -> None:
    weights = fuse(separate(), transposed=False)
    odd = {f"{BLOCK}.experts.down_proj": torch.zeros(E, 7, 9).bfloat16()}
    save_checkpoint(tmp_path / "odd", [weights | odd], CONFIG)
    assert open_component(tmp_path / "odd").translation is None
    with_biases = weights | {f"{BLOCK}.experts.{name}_proj_bias": torch.zeros(E, 8) for name in ("gate_up", "down")}
    save_checkpoint(tmp_path / "biases", [with_biases], CONFIG)
    assert open_component(tmp_path / "biases").translation is None


@pytest.mark.parametrize(
    "options",
    [
        {"format": "mxfp4", "layout": "plain", "dialect": "quark"},
        {"format": "fp8", "granularity": "block", "ignore": ("*.experts.1.up_proj",)},
        {"format": "fp8", "shard_size": 400_000},
    ],
    ids=["mxfp4", "a part kept", "over shards"],
)
def test_dequantize_puts_them_back_in_the_sources_tensors(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("run_ckpt.tools.rewrite.joined._SLAB_ELEMENTS", 40_000)
    stored = load_all(sources[1])
    is_transposed = stored[f"{BLOCK}.experts.down_proj"].shape == (E, INNER, HIDDEN)
    alone, together = (convert(source, tmp_path / f"{source.name}-out", **options) for source in sources)
    for output in (alone, together):
        assert dequantize(output, tmp_path / f"{output.name}-plain", dtype="bfloat16", progress=Silent())
    expected = fuse(load_all(tmp_path / "separate-out-plain"), transposed=is_transposed)
    found = load_all(tmp_path / "fused-out-plain")
    assert found.keys() == stored.keys()
    for name, tensor in found.items():
        assert_bits_equal(tensor, expected[name])
    assert not dequantize(together, tmp_path / "fused-out-plain", dtype="bfloat16", progress=Silent())


def test_a_tensor_of_which_a_part_was_kept_has_the_dtype_of_the_source(tmp_path: Path) -> None:
    weights = separate(torch.float32)
    save_checkpoint(tmp_path / "fused", [fuse(weights, transposed=True)], CONFIG)
    out = convert(tmp_path / "fused", tmp_path / "out", format="fp8", ignore=("*.experts.0.up_proj",))
    dequantize(out, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = load_all(tmp_path / "plain")
    assert plain[f"{BLOCK}.experts.down_proj"].dtype == torch.bfloat16
    gate_up = plain[f"{BLOCK}.experts.gate_up_proj"]
    assert_bits_equal(gate_up[0, :, INNER:].T.contiguous(), weights[f"{BLOCK}.experts.0.up_proj.weight"])


@pytest.mark.parametrize("part", [[0, 1, 99], [5, 3, 0], [0, 10**9, 0], [0, 4, -1], [0, 4, 0, 1]])
def test_a_record_that_does_not_fit_is_a_fault(tmp_path: Path, part: list[int]) -> None:
    save_checkpoint(tmp_path / "fused", [fuse(separate(), transposed=False)], CONFIG)
    out = convert(tmp_path / "fused", tmp_path / "out", format="fp8", granularity="channel")
    name = f"{BLOCK}.experts.0.up_proj.weight"

    def edit(manifest: dict[str, Any]) -> None:
        manifest["source"]["tensors"][name][0][1:] = part

    edit_manifest(out, edit)
    (report,) = verify_output(out, tmp_path / "fused", Silent())
    assert any(name in fault for fault in report.faults)


@pytest.mark.parametrize(
    "part", [[0, 383, 0], [1, 384, 0], [0, 384, 0, 1], [0, 384, 3], [0, 384, 1], ["0", 384, 0], [0, 384]]
)
def test_dequantize_refuses_a_record_that_does_not_fit(tmp_path: Path, part: list[Any]) -> None:
    save_checkpoint(tmp_path / "fused", [fuse(separate(), transposed=False)], CONFIG)
    out = convert(tmp_path / "fused", tmp_path / "out", format="fp8", granularity="channel")
    name = f"{BLOCK}.experts.0.gate_proj.weight"

    def edit(manifest: dict[str, Any]) -> None:
        manifest["source"]["tensors"][name] = [[f"{BLOCK}.experts.gate_up_proj", *part]]

    edit_manifest(out, edit)
    with pytest.raises(ManifestError, match=r"not as the manifest records|of the wrong type"):
        dequantize(out, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", FUSED)
def test_they_run_in_transformers(tmp_path: Path, name: str) -> None:
    source = save_experts(name, tmp_path / "bf16")
    out = convert(source, tmp_path / "out", format="mxfp4")
    dequantize(out, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    model, info = type(BUILDERS[name]()).from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    loaded = load_quantized(out, dtype=torch.float32, backend="dequantize")
    torch.testing.assert_close(run_logits(loaded), run_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("qwen3-vl-moe", {}), ("llama4", {"granularity": "block"})])
def test_transformers_by_itself_still_lacks_them(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    out = convert(save_experts(name, tmp_path / "bf16"), tmp_path / "out", format="fp8", **options)
    assert "3-D tensors" in str(read_manifest(out).targets["transformers"])
    _, found = type(BUILDERS[name]()).from_pretrained(out, output_loading_info=True)
    assert {f"{BLOCKS[name]}.0.{EXPERTS[name]}.{leaf}_proj" for leaf in ("gate_up", "down")} <= found["missing_keys"]
