"""What is installed with what, and what is said where a package is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from run_ckpt.extras import EXTRAS
from tests.converted import FLUX_DIGITS, convert
from tests.test_architecture import MODULES, packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Import name -> the distribution's, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
# They come with a machine's own set-up, and a backend that lacks one says so.
GPU_PACKAGES = {"aiter", "petit_kernel", "triton"}
# Servers: they load our plug-ins, in their own environment.
SERVERS = {"sglang", "vllm", "vllm_omni"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=; ]", requirement)[0] for requirement in requirements}


def run_without(package: str, code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter where the import of a package fails as if it were not installed."""
    code = f"import sys; sys.modules[{package!r}] = None\n{code}"
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(FLUX_DIGITS, tmp_path_factory.mktemp("extras") / "output", format="mxfp4")


def test_the_converter_declares_neither_torch_nor_safetensors() -> None:
    assert not names(PROJECT["dependencies"]) & {"torch", "safetensors", *EXTRAS}


@pytest.mark.parametrize("package", EXTRAS)
def test_the_extra_that_is_named_brings_the_package(package: str) -> None:
    brought = names(PROJECT["optional-dependencies"][EXTRAS[package]])
    assert DISTRIBUTIONS.get(package, package) in brought


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_declared_or_has_an_extra(module: str) -> None:
    declared = names(PROJECT["dependencies"]) | {*EXTRAS} | GPU_PACKAGES | SERVERS | {"convert_ckpt", "run_ckpt"}
    used = packages(module) - sys.stdlib_module_names - {"tomllib"}
    assert {DISTRIBUTIONS.get(name, name) for name in used - {*EXTRAS}} <= declared


@pytest.mark.parametrize(
    "args",
    [
        ("verify",),
        ("verify", "--source", FLUX_DIGITS),
        ("inspect", "--device", "cpu"),
        ("bench",),
        ("dequantize", "there"),
        ("relayout", "there", "--layout", "plain"),
    ],
    ids=["verify", "verify-source", "inspect-device", "bench", "dequantize", "relayout"],
)
def test_a_command_without_torch_says_in_one_line_how_to_get_it(
    output: Path, tmp_path: Path, args: tuple[object, ...]
) -> None:
    command, *rest = (tmp_path / "there" if arg == "there" else arg for arg in args)
    done = run_without("torch", "from run_ckpt.cli.main import main; main()", command, output, *rest)
    assert done.stderr == f"error: run-ckpt {command} needs torch: pip install 'convert-ckpt[runtime]'\n"
    assert done.returncode == 1
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("package", ["torch", "diffusers", "accelerate"])
def test_generate_names_the_extra_that_holds_all_it_needs(output: Path, tmp_path: Path, package: str) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    args = ["generate", "--model-path", tmp_path, "--transformer-path", output, "--prompt", "7"]
    code = "from run_ckpt.cli.main import main; main()"
    done = run_without(package, code, *args, "--output", tmp_path / "image.png")
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.endswith(f" needs {package}: pip install 'convert-ckpt[diffusers]'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("package", "extra"), [("torchmetrics", "compare"), ("torchvision", "lpips")])
def test_compare_asks_for_its_packages_before_it_loads_anything(
    output: Path, tmp_path: Path, package: str, extra: str
) -> None:
    (tmp_path / "prompts.txt").write_text("7\n")
    (tmp_path / "model_index.json").write_text("{}")
    args = ["compare", "--model-path", tmp_path, "--transformer-path", output, "--prompts", tmp_path / "prompts.txt"]
    # torchvision is not set up here: what needs it stops at the same place whether it is blocked or not there.
    done = run_without(package, "from run_ckpt.cli.main import main; main()", *args, "--lpips")
    assert done.stderr.endswith(f"error: run-ckpt compare needs {package}: pip install 'convert-ckpt[{extra}]'\n")


def test_the_engine_ray_without_ray_names_the_extra(tmp_path: Path) -> None:
    code = "from convert_ckpt.cli import main; main()"
    args = [FLUX_DIGITS, tmp_path / "out", "--format", "fp8", "--engine", "ray", "--quiet"]
    done = run_without("ray", code, *args)
    assert done.stderr == "error: --engine ray needs ray: pip install 'convert-ckpt[ray]'\n"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("args", [("inspect",), ("card",), ("report", "--output", "there")], ids=lambda args: args[0])
def test_a_result_is_described_without_torch(output: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    command, *rest = (str(tmp_path / "page.html") if arg == "there" else arg for arg in args)
    done = run_without("torch", "from run_ckpt.cli.main import main; main()", command, output, *rest)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("package", "code", "user", "extra"),
    [
        ("torch", "from run_ckpt import load_quantized", "load_quantized", "runtime"),
        ("torch", "from run_ckpt import QuantizedLinear", "QuantizedLinear", "runtime"),
        (
            "accelerate",
            "from run_ckpt import load_quantized; load_quantized(sys.argv[1])",
            "load_quantized without model=",
            "diffusers",
        ),
        (
            "torch",
            "import run_ckpt.integrations.diffusers",
            "run_ckpt.integrations.diffusers",
            "diffusers",
        ),
        (
            "diffusers",
            "from run_ckpt.integrations.diffusers import register",
            "run_ckpt.integrations.diffusers",
            "diffusers",
        ),
        (
            "transformers",
            "from run_ckpt.integrations.transformers import register",
            "run_ckpt.integrations.transformers",
            "diffusers",
        ),
    ],
    ids=["load", "layer", "load-class", "torch-for-diffusers", "diffusers", "transformers"],
)
def test_the_api_raises_an_import_error_that_names_the_extra(
    output: Path, package: str, code: str, user: str, extra: str
) -> None:
    catching = f"try:\n    {code}\nexcept ImportError as error:\n    print(error)"
    done = run_without(package, catching, output)
    assert done.stdout == f"{user} needs {package}: pip install 'convert-ckpt[{extra}]'\n", done.stderr


def test_importing_the_loader_loads_the_standard_library_only() -> None:
    code = "import sys; before = set(sys.modules); import run_ckpt; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"run_ckpt"}


def test_every_public_name_of_the_loader_is_there() -> None:
    import run_ckpt

    for name in run_ckpt.__all__:
        assert getattr(run_ckpt, name) is not None
    assert issubclass(run_ckpt.MissingPackageError, run_ckpt.CheckpointError)
