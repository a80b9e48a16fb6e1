"""run-ckpt on the command line: what it prints, and its exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from run_ckpt.cli.main import main
from run_ckpt.version import VERSION
from tests.converted import FLUX_DIGITS, convert, edit_manifest, make_linear


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(FLUX_DIGITS, tmp_path_factory.mktemp("cli") / "output", format="mxfp4")


def run(*args: object) -> int:
    """Return the exit code of run-ckpt with these arguments."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize(
    "command", ["", "inspect", "diff", "verify", "dequantize", "relayout", "compare", "push", "card", "report"]
)
def test_help_says_how_it_is_used(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run(*filter(None, [command]), "--help") == 0
    assert f"Usage: run-ckpt {command}".strip() in capsys.readouterr().out


def test_version_is_the_tools(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert VERSION in capsys.readouterr().out


# torch takes seconds to import and rich a tenth of one.
@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (["--help"], ["torch", "numpy", "rich", "convert", "run_ckpt.tools.publish"]),
        (["inspect"], ["torch", "numpy", "convert", "run_ckpt.tools.publish"]),
        (["diff"], ["torch", "numpy", "convert", "huggingface_hub"]),
        (["card"], ["torch", "numpy", "convert"]),
    ],
    ids=["help", "inspect", "diff", "card"],
)
def test_light_commands_do_not_import(output: Path, args: list[str], unwanted: list[str]) -> None:
    script = (
        "import sys; from run_ckpt.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, sep='\\n')"
    )
    n_outputs = {"--help": 0, "diff": 2}.get(args[0], 1)
    args = [*args, *[str(output)] * n_outputs]
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=True)
    assert not set(unwanted) & set(done.stdout.splitlines())


def test_verify_ends_with_the_result(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", output) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("against the manifest: no fault.")


def test_verify_with_source_prints_the_sqnr_of_each_layer(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", output, "--source", FLUX_DIGITS) == 0
    out = capsys.readouterr().out
    assert "transformer_blocks.0.attn.to_q " in out
    assert "19.72" in out
    assert out.splitlines()[-1].endswith("against the source: no fault.")


def test_verify_lists_every_fault_and_exits_1(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "config.json").unlink()
    (copy / "extra").write_text("")
    assert run("verify", copy) == 1
    captured = capsys.readouterr()
    assert "fault: config.json: missing" in captured.err
    assert "fault: extra: not listed" in captured.err
    assert captured.out == "3 faults found: do not use this checkpoint.\n"


def test_a_missing_folder_is_an_error_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", tmp_path / "nothing") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing'}: no such file or folder.\n"


@pytest.mark.parametrize("command", ["inspect", "dequantize"])
def test_a_folder_without_manifest_is_an_error_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    args = [tmp_path / "DIR"] if command == "dequantize" else []
    assert run(command, FLUX_DIGITS, *args) == 1
    assert "no quantization_manifest.json" in capsys.readouterr().err


def test_wrong_options_exit_2(output: Path, tmp_path: Path) -> None:
    assert run("relayout", output, tmp_path / "DIR", "--layout", "diagonal") == 2


def test_options_that_contradict_the_checkpoint_exit_2(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("relayout", output, tmp_path / "DIR", "--layout", "aiter") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_dequantize_writes_the_folder(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("dequantize", output, tmp_path / "plain") == 0
    assert (tmp_path / "plain" / "config.json").is_file()
    assert capsys.readouterr().out.startswith(f"Dequantized {output} to {tmp_path / 'plain'}: ")
    assert run("dequantize", output, tmp_path / "plain") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'plain'} is complete already: the same, byte for byte.\n"


def test_relayout_writes_a_folder_that_verifies(output: Path, tmp_path: Path) -> None:
    assert run("relayout", output, tmp_path / "plain", "--layout", "plain") == 0
    assert run("verify", tmp_path / "plain", "--source", FLUX_DIGITS) == 0


def test_inspect_shows_sizes_errors_and_reasons(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", output) == 0
    out = capsys.readouterr().out
    for expected in ("flux-digits", "23 of 90 tensors", "gfx950", "18.97 dB", "SGLang builds it as a plain linear"):
        assert expected in out


def test_inspect_puts_like_blocks_in_one_row(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("inspect", output)
    collapsed = capsys.readouterr().out
    run("inspect", output, "--all")
    every = capsys.readouterr().out
    assert "single_transformer_blocks.*.proj_mlp" in collapsed
    assert "single_transformer_blocks.0.proj_mlp" not in collapsed
    assert "single_transformer_blocks.*.proj_mlp" not in every
    assert all(f"single_transformer_blocks.{i}.proj_mlp" in every for i in range(3))


def test_inspect_json_holds_every_layer(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", output, "--json") == 0
    (inspection,) = json.loads(capsys.readouterr().out)
    assert len(inspection["layers"]) == inspection["summary"]["n_layers"] == 23
    assert inspection["summary"]["worst_layer"] == "single_transformer_blocks.2.proj_out"
    assert len(inspection["kept_linears"]) == 17


def test_inspect_shows_every_component_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transformer", "transformer_2"):
        make_linear(tmp_path / "source" / name, 256, 256)
    (tmp_path / "source" / "model_index.json").write_text("{}")
    output = convert(tmp_path / "source", tmp_path / "output", format="fp8")
    assert run("inspect", output, "--json") == 0
    components = [inspection["summary"]["component"] for inspection in json.loads(capsys.readouterr().out)]
    assert components == ["transformer", "transformer_2"]


def test_inspect_refuses_a_manifest_that_contradicts_itself(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    edit_manifest(copy, lambda manifest: manifest["recipe"].update(dialect="klingon"))
    assert run("inspect", copy) == 1
    assert "dialect 'klingon' is unknown" in capsys.readouterr().err
