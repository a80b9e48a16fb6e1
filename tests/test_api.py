"""The Python API of converting: the command's options, its result and its errors."""

import ast
import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from click.testing import CliRunner

import convert_ckpt
from convert_ckpt import (
    CheckpointError,
    FaultsError,
    Options,
    RunSummary,
    UsageError,
    convert,
    plan_conversion,
)
from convert_ckpt.cli import cli
from run_ckpt.progress import Silent
from tests import converted
from tests.checkpoints import FLUX_DIGITS, folder_bytes

# What is printed, and how, is the command's own; --dry-run is plan_conversion().
COMMANDS_OWN = {"dry_run", "quiet", "as_json"}
PARAMETERS = inspect.signature(convert).parameters


class Recorded(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.nbytes = 0

    def advance(self, nbytes: int) -> None:
        self.nbytes += nbytes

    def log(self, line: str) -> None:
        self.lines.append(line)


def test_it_takes_the_options_of_the_command_with_their_defaults() -> None:
    given = {"source": "SOURCE", "output": Path("OUTPUT"), "format": "fp8"}
    of_command = cli.make_context("convert-ckpt", ["SOURCE", "OUTPUT", "--format", "fp8"]).params
    of_function = {name: parameter.default for name, parameter in PARAMETERS.items() if name != "progress"}
    assert {name: value for name, value in of_command.items() if name not in COMMANDS_OWN} == of_function | given


def test_options_are_keyword_only() -> None:
    kinds = {name: parameter.kind for name, parameter in PARAMETERS.items()}
    assert [name for name, kind in kinds.items() if kind is not inspect.Parameter.KEYWORD_ONLY] == ["source", "output"]


def test_options_hold_what_decides_the_bytes_with_the_same_defaults() -> None:
    for field in fields(Options):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        assert PARAMETERS[field.name].default == default, field.name


def test_every_field_of_the_options_and_every_argument_is_documented() -> None:
    (record,) = ast.parse(inspect.getsource(Options)).body
    assert isinstance(record, ast.ClassDef)
    followers = dict(zip(record.body, record.body[1:], strict=False))
    for statement, follower in followers.items():
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(follower, ast.Expr), ast.unparse(statement)
    of_options = {field.name for field in fields(Options)}
    undocumented = [name for name in PARAMETERS if f"{name}: " not in str(convert.__doc__)]
    assert set(undocumented) - of_options == {"output"}


@pytest.mark.parametrize("options", converted.SCHEMES.values(), ids=converted.SCHEMES)
def test_it_writes_the_bytes_of_the_command(tmp_path: Path, options: dict[str, str]) -> None:
    summary = convert(str(FLUX_DIGITS), tmp_path / "api", **options)  # type: ignore[arg-type]
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = CliRunner().invoke(cli, [str(FLUX_DIGITS), str(tmp_path / "cli"), *arguments])
    assert folder_bytes(tmp_path / "api") == folder_bytes(tmp_path / "cli")
    assert done.stdout.partition(" in ")[0] == str(summary).partition(" in ")[0]


def test_the_summary_says_what_was_done(tmp_path: Path) -> None:
    summary = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    assert isinstance(summary, RunSummary)
    assert (summary.output, summary.format, summary.n_files_resumed) == (str(tmp_path / "out"), "mxfp4", 0)
    assert (summary.n_converted, summary.n_tensors) == (23, 90)
    assert summary.output_nbytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert summary.source_nbytes == sum(path.stat().st_size for path in FLUX_DIGITS.glob("*.safetensors"))
    assert "pushed_to" not in summary.to_json()


def test_one_pattern_may_be_given_without_a_list(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "one", format="fp8", ignore="*.attn.*")
    convert(FLUX_DIGITS, tmp_path / "list", format="fp8", ignore=["*.attn.*"])
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "list")


def test_nothing_is_printed_and_progress_is_told_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Recorded()
    convert(FLUX_DIGITS, tmp_path / "out", format="fp8", progress=progress)
    assert capfd.readouterr() == ("", "")
    written = [line for line in progress.lines if line.startswith("wrote")]
    assert [line.split()[:2] for line in sorted(written)] == [
        ["wrote", f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"] for n in (1, 2)
    ]
    assert progress.nbytes > 0


def test_a_plan_says_what_a_conversion_then_writes(tmp_path: Path) -> None:
    options = Options(format="fp8", ignore=("*.attn.*",))
    preview = plan_conversion(FLUX_DIGITS, options, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = convert(FLUX_DIGITS, tmp_path / "out", format="fp8", ignore="*.attn.*")
    (component,) = preview.components
    assert {file["name"]: file["nbytes"] for file in component["files"]} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert f"Would convert {summary.n_converted} of {summary.n_tensors} tensors to fp8" in str(preview)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int4"}, "--format int4: unknown. Choose one of mxfp4, nvfp4, mxfp8, fp8"),
        ({"format": "fp8", "revision": "main"}, "--revision goes with --push-to-hub"),
        ({"format": "fp8", "workers": 0}, "--workers 0: at least one"),
        ({"format": "fp8", "recipe": "none.toml"}, "none.toml"),
        ({"format": "fp8", "calibration": "none.safetensors"}, "none.safetensors"),
    ],
    ids=["format", "push", "workers", "recipe", "calibration"],
)
def test_wrong_arguments_raise_one_kind_of_error(tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(FLUX_DIGITS, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_faults_are_listed_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FaultsError) as raised:
        convert(FLUX_DIGITS, tmp_path / "full", format="mxfp4")
    assert len(raised.value.faults) == 1
    assert not issubclass(FaultsError, UsageError)


def test_importing_the_converter_loads_the_standard_library_only() -> None:
    code = "import sys; before = set(sys.modules); import convert_ckpt; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"convert_ckpt", "run_ckpt"}


def test_every_public_name_is_there() -> None:
    for name in convert_ckpt.__all__:
        assert getattr(convert_ckpt, name) is not None
    for package in ("convert/convert_ckpt", "runtime/run_ckpt"):
        assert (Path(__file__).parents[1] / package / "py.typed").is_file()
