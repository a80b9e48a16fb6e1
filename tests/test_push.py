"""Publishing: what goes to the Hub, in which order, what is sent again, and what is refused.

The real huggingface_hub client talks to a stand-in for the Hub on loopback (hub_upload_server.py).
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert_ckpt import api
from convert_ckpt.push import convert_and_push
from run_ckpt.contract.errors import CheckpointError, FaultsError, PublishError, UsageError
from run_ckpt.contract.file_names import CARD_NAME, MAP_NAME
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.progress import Silent
from run_ckpt.tools.publish.push import Pushed, push_result
from run_ckpt.tools.publish.repository import Target
from tests.checkpoints import folder_bytes, random_weight, save_checkpoint
from tests.converted import convert, make_linear
from tests.hub_fixtures import Lines
from tests.hub_upload_server import TOKEN, Hub, serve_hub

REPO = "me/digits-mxfp4"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
CARD_FILES = {CARD_NAME, MAP_NAME}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two layers, the first large enough to be sent in parts."""
    shards = [
        {f"blocks.{block}.{name}.weight": random_weight(rows, 256, seed=block) for name in ("up", "down")}
        for block, rows in enumerate((2048, 256))
    ]
    config: dict[str, object] = {"_class_name": "TinyModel"}
    return save_checkpoint(tmp_path_factory.mktemp("push") / "source", shards, config, "diffusion_pytorch_model")


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("push") / "output", format="mxfp4")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with the client pointed at it and logged in."""
    from huggingface_hub import constants

    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("CONVERT_CKPT_URL", "https://example.org/convert-ckpt")
        yield hub


def push(output: Path, repo_id: str = REPO, **options: object) -> Pushed:
    target = Target(repo_id, **options)  # type: ignore[arg-type]
    return push_result(output, target, base_model=None, progress=Silent())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sent_shards(hub: Hub, output: Path) -> set[str]:
    """Return the shards of which any byte was sent, and forget them."""
    names = {sha256(output / name): name for name in SHARDS}
    sent = {names[oid] for oid in hub.sent if oid in names}
    hub.sent.clear()
    return sent


def command_environment(hub: Hub) -> dict[str, str]:
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, **switches}


def run_ckpt(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from run_ckpt.cli.main import main; main()", *map(str, arguments)]


def convert_ckpt(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from convert_ckpt.cli import main; main()", *map(str, arguments)]


def test_the_repo_holds_the_result_and_its_card(hub: Hub, output: Path) -> None:
    pushed = push(output)
    held = hub.files(REPO)
    assert {name: data for name, data in held.items() if name not in CARD_FILES} == folder_bytes(output)
    assert held.keys() - folder_bytes(output).keys() == CARD_FILES
    assert held[MAP_NAME].startswith(b"<svg ")
    assert hub.sent.count(sha256(output / SHARDS[0])) > 1  # in parts
    assert str(pushed).startswith(f"Pushed {len(held)} of {len(held)} files")


def test_shards_come_one_by_one_and_what_completes_the_repo_last(hub: Hub, output: Path) -> None:
    push(output, commit_message="Here it is")
    *shards, (title, last) = hub.commits(REPO)
    assert [names for _, names in shards] == [{name} for name in SHARDS]
    assert {"config.json", MANIFEST_NAME, CARD_NAME} <= last
    assert title == "Here it is"


def test_pushing_twice_sends_nothing(hub: Hub, output: Path) -> None:
    push(output)
    n_commits, n_sent = len(hub.commits(REPO)), len(hub.sent)
    assert "nothing to push" in str(push(output))
    assert (len(hub.commits(REPO)), len(hub.sent)) == (n_commits, n_sent)


def test_a_downloaded_repo_verifies(hub: Hub, source: Path, output: Path, tmp_path: Path) -> None:
    from run_ckpt.tools.verify.component import verify_output

    push(output)
    for name, data in {**hub.files(REPO), ".gitattributes": b""}.items():
        (tmp_path / name).write_bytes(data)
    (report,) = verify_output(tmp_path, source, Silent())
    assert report.faults == ()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_after_a_kill_in_the_middle_only_what_is_missing_goes_up(
    hub: Hub, output: Path, number: signal.Signals, code: int
) -> None:
    second, reached, resume = sha256(output / SHARDS[1]), threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT" and second in path:
            reached.set()
            resume.wait(30)

    hub.fault = hold
    process = subprocess.Popen(run_ckpt("push", output, REPO), env=command_environment(hub))
    assert reached.wait(60)
    process.send_signal(number)
    assert process.wait(25) == code
    resume.set()
    assert hub.files(REPO).keys() == {SHARDS[0]}
    hub.fault = lambda method, path: None
    sent_shards(hub, output)
    push(output)
    assert sent_shards(hub, output) == {SHARDS[1]}
    assert folder_bytes(output).items() <= hub.files(REPO).items()


def test_a_hub_that_stumbles_once_is_asked_again(hub: Hub, output: Path) -> None:
    answers = iter([503])
    hub.fault = lambda method, path: next(answers, None) if method == "PUT" else None
    push(output)
    assert folder_bytes(output).items() <= hub.files(REPO).items()


def test_other_content_is_refused_and_overwritten_on_demand_in_one_commit(hub: Hub, output: Path) -> None:
    hub.create(REPO, files={"pytorch_model.bin": b"old", "config.json": b"{}", SHARDS[0]: b"old"})
    with pytest.raises(PublishError, match=r"holds something else .*--overwrite"):
        push(output)
    assert hub.sent == []
    push(output, overwrite=True)
    assert folder_bytes(output).items() <= hub.files(REPO).items()
    assert "pytorch_model.bin" not in hub.files(REPO)
    assert len(hub.commits(REPO)) == 2  # by hand, and ours: at no moment a mixture


def test_overwriting_removes_what_is_not_ours_even_where_nothing_is_sent(hub: Hub, output: Path) -> None:
    push(output)
    repo = hub.repos[REPO]
    files = repo.branches["main"][-1].files
    hub.add_commit(repo, "main", "stray", {**files, "stray.bin": files["config.json"]})
    hub.sent.clear()
    assert "removed 1" in str(push(output, overwrite=True))
    assert "stray.bin" not in hub.files(REPO)
    assert hub.sent == []


def test_a_card_edited_on_the_hub_stays(hub: Hub, output: Path) -> None:
    push(output)
    repo = hub.repos[REPO]
    files = repo.branches["main"][-1].files
    edited = type(files[CARD_NAME])(b"---\nlicense: mit\n---\nmine", False)
    hub.add_commit(repo, "main", "Edit card", {**files, CARD_NAME: edited})
    assert "nothing to push" in str(push(output))
    assert hub.files(REPO)[CARD_NAME].endswith(b"mine")


def test_a_new_branch_does_not_start_with_what_main_holds(hub: Hub, output: Path) -> None:
    hub.create(REPO, files={"config.json": b"{}"})
    push(output, revision="mxfp4")
    assert folder_bytes(output).items() <= hub.files(REPO, "mxfp4").items()
    assert hub.files(REPO) == {"config.json": b"{}"}


def test_private_holds_for_a_new_repo_and_is_refused_for_a_public_one(hub: Hub, output: Path) -> None:
    push(output, private=True)
    assert hub.repos[REPO].private
    hub.create("me/public")
    with pytest.raises(PublishError, match="public"):
        push(output, "me/public", private=True)


def test_components_of_a_pipeline_keep_their_folders(hub: Hub, tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        make_linear(tmp_path / "source" / name, 256, 256)
    (tmp_path / "source" / "model_index.json").write_text("{}")
    pushed = push(output := convert(tmp_path / "source", tmp_path / "output", format="fp8"))
    assert folder_bytes(output).keys() == hub.files(REPO).keys() - CARD_FILES
    assert len(pushed.sent) == pushed.n_files
    assert "nothing to push" in str(push(output))


def test_a_damaged_folder_is_not_pushed(hub: Hub, output: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(output, tmp_path / "damaged")
    data = bytearray((damaged / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (damaged / SHARDS[1]).write_bytes(data)
    with pytest.raises(FaultsError, match="nothing was pushed"):
        push(damaged)
    assert hub.sent == []


@pytest.mark.parametrize("name", ["me/flux-4bit", "me/flux-AWQ", "me/flux-gptq-v2", "flux", "a/b/c", "me/flux digits"])
def test_names_that_mislead_or_can_not_be_are_refused(hub: Hub, output: Path, name: str) -> None:
    with pytest.raises(UsageError):
        push(output, name)


@pytest.mark.parametrize(
    ("status", "where", "remedy"),
    [
        (401, "auth-check", "hf auth login"),
        (403, "auth-check", "write permission"),
        (404, "preupload", "Check the name"),
        (409, "create", "Push again"),
        (412, "/commit/", "Push again"),
        (429, "/commit/", "Push again later"),
        (500, "/commit/", "Push again later"),
        (422, "/commit/", "refuses"),
    ],
)
def test_each_refusal_is_one_line_with_a_remedy(hub: Hub, output: Path, status: int, where: str, remedy: str) -> None:
    hub.fault = lambda method, path: status if where in path else None
    with pytest.raises(PublishError, match=remedy) as error:
        push(output)
    assert str(status) in str(error.value)
    assert "\n" not in str(error.value)


def test_someone_elses_namespace_and_no_login(hub: Hub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PublishError, match="write permission"):
        push(output, "others/digits")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong")
    with pytest.raises(PublishError, match="hf auth login"):
        push(output)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("CONVERT_CKPT_URL", "https://example.org/convert-ckpt")
    with pytest.raises(PublishError, match="no full answer") as error:
        push(output)
    assert "\n" not in str(error.value)


def test_a_change_by_someone_else_during_the_push_is_noticed(hub: Hub, output: Path) -> None:
    def intrude(method: str, path: str) -> None:
        if path.endswith("/batch") and len(hub.commits(REPO)) == 1:
            repo = hub.repos[REPO]
            hub.add_commit(repo, "main", "meanwhile", repo.branches["main"][-1].files)

    hub.fault = intrude
    with pytest.raises(PublishError, match=r"it was changed.*\(412\)"):
        push(output)


def test_the_command_exits_with_1_and_never_shows_the_token(hub: Hub, output: Path) -> None:
    hub.fault = lambda method, path: 403 if "/commit/" in path else None
    done = subprocess.run(run_ckpt("push", output, REPO), env=command_environment(hub), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert TOKEN not in done.stdout + done.stderr


def test_a_conversion_pushes_each_shard_when_it_is_finished(hub: Hub, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    seen_complete = []

    def look(method: str, path: str) -> None:
        if "/commit/" in path:
            seen_complete.append(output.exists())

    hub.fault = look
    command = convert_ckpt(
        source, output, "--format", "mxfp4", "--preset", "generic", "--push-to-hub", REPO, "--private", "--workers", 1
    )
    done = subprocess.run(command, env=command_environment(hub), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_files = len(hub.files(REPO))
    # What went up while converting is counted too.
    assert re.search(rf"^Converted 4 .*\nPushed {n_files} of {n_files} files", done.stdout)
    assert folder_bytes(output).items() <= hub.files(REPO).items()
    assert seen_complete[-1]
    assert not seen_complete[0]  # the first shard was there before the result was
    assert hub.repos[REPO].private


def test_a_push_that_fails_leaves_the_conversion_and_says_how_to_go_on(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.fault = lambda method, path: 403 if "/commit/" in path else None
    output = tmp_path / "output"
    command = convert_ckpt(source, output, "--format", "mxfp4", "--preset", "generic", "--push-to-hub", REPO)
    done = subprocess.run(command, env=command_environment(hub), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"run-ckpt push {output} {REPO}" in done.stderr
    hub.fault = lambda method, path: None
    push(output)
    assert folder_bytes(output).items() <= hub.files(REPO).items()


def test_a_repo_with_other_content_stops_a_conversion_before_it_starts(hub: Hub, tmp_path: Path) -> None:
    hub.create(REPO, files={"pytorch_model.bin": b"old"})
    started = []

    def convert_nothing(listener: object) -> None:
        listener.start(SHARDS)  # type: ignore[attr-defined]
        started.append(True)

    options = {"base_model": None, "at_end": False, "progress": Silent()}
    with pytest.raises(CheckpointError, match="holds something else"):
        convert_and_push(convert_nothing, tmp_path, {"repo_id": REPO}, **options)  # type: ignore[arg-type]
    assert not started


def test_a_conversion_whose_result_is_there_already_sends_nothing(
    hub: Hub, source: Path, output: Path, tmp_path: Path
) -> None:
    push(output)
    hub.sent.clear()
    lines = Lines()
    summary = api.convert(
        source, tmp_path / "again", format="mxfp4", preset="generic", push_to_hub=REPO, progress=lines
    )
    assert "nothing to push" in str(summary.pushed)
    assert summary.to_json()["pushed_to"] == f"{hub.url}/{REPO}"
    assert hub.sent == []
    assert any("at the end" in line for line in lines.lines)


@pytest.mark.parametrize("at_end", [False, True], ids=["each-shard", "at-end"])
def test_another_result_in_the_repo_is_refused_before_anything_is_converted(
    hub: Hub, source: Path, output: Path, tmp_path: Path, at_end: bool
) -> None:
    push(output)
    options: dict[str, Any] = {"format": "mxfp4", "scale_rule": "mse", "preset": "generic", "push_at_end": at_end}
    with pytest.raises(PublishError, match=r"another result \(recipe.scale_rule was 'even', now 'mse'\).*--overwrite"):
        api.convert(source, tmp_path / "again", push_to_hub=REPO, **options)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("again")] == []
    api.convert(source, tmp_path / "again", push_to_hub=REPO, overwrite=True, **options)
    assert folder_bytes(tmp_path / "again").items() <= hub.files(REPO).items()


def test_the_same_command_again_pushes_what_the_repo_lacks(hub: Hub, source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "mxfp4", "preset": "generic"}
    api.convert(source, tmp_path / "out", **options)
    summary = api.convert(source, tmp_path / "out", push_to_hub=REPO, **options)
    assert summary.was_complete
    assert folder_bytes(tmp_path / "out").items() <= hub.files(REPO).items()
    again = api.convert(source, tmp_path / "out", push_to_hub=REPO, **options)
    assert "nothing to push" in str(again.pushed)


def test_a_card_that_names_no_place_of_the_tool_is_not_pushed(
    hub: Hub, source: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONVERT_CKPT_URL")
    monkeypatch.setattr("run_ckpt.tools.publish.tool_url._installed_url", lambda: None)
    with pytest.raises(UsageError, match=r"placeholder\. Give --tool-url URL, or set CONVERT_CKPT_URL"):
        push(output)
    with pytest.raises(UsageError, match="placeholder"):
        api.convert(source, tmp_path / "out", format="mxfp4", preset="generic", push_to_hub=REPO)
    assert hub.requests == []
    assert not (tmp_path / "out").exists()
    push(output, tool_url="https://example.org/mine")
    assert b"git clone https://example.org/mine" in hub.files(REPO)[CARD_NAME]


def test_push_options_without_a_repo_are_wrong_usage(source: Path, tmp_path: Path) -> None:
    command = convert_ckpt(source, tmp_path / "output", "--format", "mxfp4", "--private")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--push-to-hub" in done.stderr
