"""Nunchaku's SVDQuant files: tiles, smoothing, low-rank branch and shifted biases are those of the model it runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from run_ckpt.contract.errors import FaultsError
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.summary import inspect_component
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all
from tests.models import MODELS
from tests.nunchaku_files import linear, modulation, pack_vector, write

Q = "transformer_blocks.0.attn.to_out.0"
NAMES = ("smooth_factor", "proj_down", "proj_up")


@pytest.mark.parametrize(
    ("family", "nvfp4"), [("flux1", False), ("flux1", True), ("qwen-image", False), ("z-image", True)]
)
def test_a_result_is_that_of_the_weights_in_diffusers_form(tmp_path: Path, family: str, *, nvfp4: bool) -> None:
    written = write(tmp_path / "svdq.safetensors", family, nvfp4=nvfp4)
    folder = tmp_path / "diffusers"
    MODELS[family].build().save_config(folder)  # type: ignore[operator]
    save_file({name: value.contiguous() for name, value in written.values.items()}, folder / "model.safetensors")
    for source, output in ((written.path, "out"), (folder, "expected")):
        convert(source, tmp_path / output, format="mxfp8", target="run-ckpt", preset=None)
    manifest, ours, expected = (
        read_manifest(tmp_path / "out"),
        *map(load_all, (tmp_path / "out", tmp_path / "expected")),
    )
    assert ours.keys() == expected.keys()
    assert manifest.layers.keys() == read_manifest(tmp_path / "expected").layers.keys()
    for name, tensor in expected.items():
        assert_bits_equal(ours[name], tensor.bfloat16() if name in manifest.kept else tensor)
    assert manifest.source["quantized"]["by"] == "Nunchaku"
    kind = f"svdquant_{'nvfp4' if nvfp4 else 'int4'} requantized"
    assert manifest.source["quantized"]["weights"][kind] > 0
    (report,) = verify_output(tmp_path / "out", written.path, Silent())
    assert report.faults == ()


def test_a_folder_with_config_json_gives_the_same_and_keeps_what_it_says(tmp_path: Path) -> None:
    written = write(tmp_path / "svdq.safetensors", "flux1")
    convert(written.path, tmp_path / "file", format="fp8", preset=None)
    tensors = load_file(written.path)
    folder = tmp_path / "folder"
    MODELS["flux1"].build().save_config(folder)  # type: ignore[operator]
    in_blocks = {name: tensor for name, tensor in tensors.items() if "transformer_blocks." in name}
    save_file(in_blocks, folder / "transformer_blocks.safetensors")
    others = {name: tensor for name, tensor in tensors.items() if name not in in_blocks}
    save_file(others, folder / "unquantized_layers.safetensors")
    convert(folder, tmp_path / "out", format="fp8", preset=None)
    ours, expected = load_all(tmp_path / "out"), load_all(tmp_path / "file")
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bits_equal(ours[name].view(torch.uint8), tensor.view(torch.uint8))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["axes_dims_rope"]


def test_dequantized_weights_and_what_inspect_says(tmp_path: Path) -> None:
    written = write(tmp_path / "svdq.safetensors", "qwen-image")
    dequantize(written.path, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = load_all(tmp_path / "plain")
    for name in (
        f"{Q}.weight",
        f"{Q}.bias",
        "transformer_blocks.1.img_mod.1.weight",
        "transformer_blocks.0.img_mlp.net.2.bias",
    ):
        assert_bits_equal(plain[name], written.values[name].bfloat16())
    whole = torch.cat([written.values[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"])
    assert_bits_equal(plain["transformer_blocks.0.attn.to_qkv.weight"], whole.bfloat16())
    summary = inspect_component("", written.path, every_layer=True).summary
    assert (summary.tool, summary.output_nbytes) == ("Nunchaku", written.path.stat().st_size)


def one_linear(**changes: Tensor | None) -> dict[str, Tensor]:
    stored, _, _ = linear(128, 256, 0, nvfp4=False, names=NAMES)
    return {f"{Q}.{leaf}": part for leaf, part in {**stored, **changes}.items() if part is not None}


def renamed(old: str, new: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name.replace(old, new): tensor for name, tensor in one_linear().items()}


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "of another model": (
        renamed("transformer_blocks", "down_blocks"),
        "is of no model of Nunchaku's that is read here",
    ),
    "of no known module": (renamed("to_out.0", "to_x"), "is of no model of Nunchaku's that is read here"),
    "something beside it": (lambda: one_linear(wshift=torch.ones(1)), "has wshift beside it"),
    "scales of another shape": (lambda: one_linear(wscales=torch.ones(8, 128).bfloat16()), "no weight as Nunchaku"),
    "no smoothing": (lambda: one_linear(smooth_factor=None), "no weight as Nunchaku"),
    "half a branch": (lambda: one_linear(proj_up=None), "no weight as Nunchaku"),
    "a scale of a channel": (lambda: one_linear(wcscales=torch.ones(128).bfloat16()), "no weight as Nunchaku"),
    "half a tile": (
        lambda: one_linear(qweight=torch.ones(64, 128, dtype=torch.int8), wscales=torch.ones(4, 64).bfloat16()),
        "no weight as Nunchaku",
    ),
    "a bias of another size": (lambda: one_linear(bias=torch.ones(64)), "no bias of 128 rows"),
    "no bias to take up a shift": (renamed("attn.to_out.0", "img_mlp.net.2"), "has no bias, which the shift"),
    "columns of half a weight": (
        lambda: {
            name.replace(Q, "single_transformer_blocks.0.mlp_fc2"): tensor
            for name, tensor in one_linear(bias=pack_vector(torch.ones(128))).items()
        },
        "its columns follow those of single_transformer_blocks.0.out_proj, which is missing",
    ),
    "a modulation without zero points": (
        lambda: {
            f"transformer_blocks.0.img_mod.1.{leaf}": tensor
            for leaf, tensor in modulation(384, 64, 0)[0].items()
            if leaf != "wzeros"
        },
        "no weight of a modulation",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_nunchakus_package_does_not_say_is_refused(
    tmp_path: Path, make: Callable[[], dict[str, Tensor]], message: str
) -> None:
    file = tmp_path / "svdq.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in make().items()}, file)
    with pytest.raises(FaultsError, match=message):
        dequantize(file, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    with pytest.raises(FaultsError, match=message):
        convert(file, tmp_path / "out", format="fp8")
