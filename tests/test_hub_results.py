"""Results and sources of the Hub wherever a folder is asked for, and paths that are misspelt."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from run_ckpt import load_quantized
from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.errors import CheckpointError, FetchError, UsageError
from run_ckpt.storage.components import find_components
from run_ckpt.storage.snapshots import local_path
from tests.bits import assert_bits_equal
from tests.converted import FLUX_DIGITS, convert, make_linear
from tests.hub_fixtures import convert_remote, hub
from tests.hub_server import Fault, HubServer, read_files

__all__ = ["hub"]


@pytest.fixture
def digits(hub: HubServer, tmp_path: Path) -> Path:
    """A result here, and as me/digits; its source is me/source."""
    out = convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4")
    hub.add_repo("me/digits", read_files(out))
    hub.add_repo("me/source", read_files(FLUX_DIGITS))
    return out


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_ckpt, [str(argument) for argument in arguments])


def fetched(hub: HubServer) -> set[str]:
    return {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}


@pytest.mark.parametrize("command", ["inspect", "report", "card", "diff"])
def test_what_reads_the_manifest_fetches_no_shard(hub: HubServer, digits: Path, tmp_path: Path, command: str) -> None:
    more = {"diff": [digits], "report": ["--output", tmp_path / "report.html"]}.get(command, [])
    result = run(command, "me/digits", *more)
    assert result.exit_code == 0, result.output
    assert "quantization_manifest.json" in fetched(hub)
    assert not any(name.endswith(".safetensors") for name in fetched(hub))


@pytest.mark.parametrize("name", ["me/digits", "hf://me/digits@main"])
def test_the_card_of_a_repo_is_titled_by_its_name_and_fetches_from_it(digits: Path, name: str) -> None:
    result = run("card", name)
    assert result.exit_code == 0, result.output
    assert "\n# digits\n" in result.output
    assert "hf download me/digits --local-dir COPY" in result.output


def test_a_result_without_a_manifest_is_fetched_whole(hub: HubServer, digits: Path) -> None:
    files = read_files(digits)
    del files["quantization_manifest.json"]
    hub.add_repo("me/other-tool", files)
    local_path("me/other-tool", small=True)
    assert any(name.endswith(".safetensors") for name in fetched(hub))


@pytest.mark.parametrize("output", ["me/digits", "hf://me/digits@main", None], ids=str)
def test_verify_takes_output_and_source_from_the_hub(hub: HubServer, digits: Path, output: str | None) -> None:
    result = run("verify", output or digits, "--source", "me/source")
    assert result.exit_code == 0, result.output
    assert "against the source: no fault" in result.output


def test_load_quantized_takes_a_repo(digits: Path) -> None:
    loaded, expected = load_quantized("me/digits"), load_quantized(digits)
    for name, tensor in expected.state_dict().items():
        assert_bits_equal(loaded.state_dict()[name], tensor)


def test_a_page_of_the_hub_names_its_repo_and_a_folder_of_a_repo_itself(
    hub: HubServer, digits: Path, tmp_path: Path
) -> None:
    hub.add_repo("me/pipeline", {f"transformer/{name}": data for name, data in read_files(digits).items()})
    for name in (f"{hub.endpoint}/me/pipeline/tree/main/transformer", "hf://me/pipeline/transformer"):
        assert read_files(local_path(name)) == read_files(digits)
    assert find_components(local_path(f"{hub.endpoint}/me/pipeline")).keys() == {"transformer"}
    with pytest.raises(FetchError, match="no nowhere in this repo"):
        local_path("hf://me/pipeline/nowhere")


def test_another_store_is_only_for_convert_ckpt() -> None:
    with pytest.raises(UsageError, match=r"s3://bucket/x: only convert-ckpt reads other stores"):
        local_path("s3://bucket/x")


def test_a_misspelt_path_is_asked_for_once_and_told_what_is_there(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_linear(tmp_path / "models" / "llama", 256, 256)
    monkeypatch.chdir(tmp_path)
    hub.stop()  # which waits for its own thread
    waits: list[float] = []
    monkeypatch.setattr("threading.Event.wait", lambda _, seconds=None: waits.append(seconds) or True)
    says = r"^models/lama: no such path here \(did you mean models/llama\?\), and no full answer from"
    with pytest.raises(FetchError, match=says):
        convert_remote("models/lama", tmp_path / "out", format="fp8")
    with pytest.raises(FetchError, match=says):
        local_path("models/lama")
    assert not any(waits)


CASES: dict[str, tuple[str, str]] = {
    "the last part": ("models/llama/transfromer", r"did you mean models/llama/transformer\?"),
    "a part before": ("modles/llama/transformer", r"did you mean models/llama/transformer\?"),
    "nothing alike": ("elsewhere/entirely/else", r"no such file or folder\. Give"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_path_that_is_not_there_is_told_the_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (tmp_path / "models" / "llama" / "transformer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path, says = CASES[case]
    with pytest.raises(CheckpointError, match=says):
        find_components(Path(path))


@pytest.mark.parametrize("answer", ["[]", "null", '{"id": "me/digits", "siblings": []}', '{"siblings": [5]}', "<html>"])
def test_what_answers_in_place_of_the_hub_is_named(hub: HubServer, digits: Path, answer: str) -> None:
    hub.faults = [Fault("/api/models", status=200, body=answer.encode())]
    result = run("inspect", "me/digits")
    assert isinstance(result.exception, FetchError)
    assert "does not answer as the Hub does" in str(result.exception)
