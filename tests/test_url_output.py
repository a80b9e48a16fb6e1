"""OUTPUT in an object store: the bytes of a local run, the manifest last; on a real S3 server on loopback (moto's)."""

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from convert_ckpt import api
from convert_ckpt.cli import cli
from convert_ckpt.upload import StoreFolder
from run_ckpt.contract.errors import PublishError, UsageError
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.storage.reference import UrlRef
from tests.checkpoints import convert, folder_bytes
from tests.hub_fixtures import make_llm


def stored(filesystem: Any, folder: str) -> dict[str, bytes]:
    filesystem.invalidate_cache()
    return {name.removeprefix(folder).lstrip("/"): filesystem.cat_file(name) for name in filesystem.find(folder)}


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return make_llm(tmp_path / "llm", n_shards=3)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_bucket_gets_the_bytes_of_a_local_run_the_manifest_last(
    s3: Any,
    llm: Path,
    tmp_path: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    put = StoreFolder.put
    monkeypatch.setattr(StoreFolder, "put", lambda self, path, name: (put(self, path, name), sent.append(name)))
    summary = api.convert(llm, "s3://bucket/results/llm", format="mxfp4")
    convert(llm, tmp_path / "local", format="mxfp4")
    assert stored(s3, "bucket/results/llm") == folder_bytes(tmp_path / "local")
    assert summary.output == "s3://bucket/results/llm"
    assert (len(sent), sent[-1]) == (len({*sent}), MANIFEST_NAME)
    assert [*here.iterdir()] == []


@pytest.mark.parametrize("n_sent", [0, 1, 4])
def test_an_upload_that_was_stopped_is_continued_by_the_same_command(
    s3: Any,
    llm: Path,
    tmp_path: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_sent: int,
) -> None:
    put, sent = StoreFolder.put, []

    def put_or_fail(self: StoreFolder, path: Path, name: str) -> None:
        if len(sent) == n_sent:
            raise PublishError("stopped")
        put(self, path, name)
        sent.append(name)

    with monkeypatch.context() as patch, pytest.raises(PublishError, match="stopped"):
        patch.setattr(StoreFolder, "put", put_or_fail)
        api.convert(llm, "s3://bucket/llm", format="fp8")
    assert MANIFEST_NAME not in stored(s3, "bucket/llm")
    api.convert(llm, "s3://bucket/llm", format="fp8")
    convert(llm, tmp_path / "local", format="fp8")
    assert stored(s3, "bucket/llm") == folder_bytes(tmp_path / "local")
    assert [*here.iterdir()] == []


@pytest.mark.parametrize("name", ["mine.txt", MANIFEST_NAME])
def test_a_folder_with_something_else_is_refused_before_anything_is_converted(
    s3: Any,
    llm: Path,
    here: Path,
    name: str,
) -> None:
    s3.pipe_file(f"bucket/llm/{name}", b"{}")
    with pytest.raises(PublishError, match="holds something already"):
        api.convert(llm, "s3://bucket/llm", format="fp8")
    assert stored(s3, "bucket/llm") == {name: b"{}"}
    assert [*here.iterdir()] == []


def test_the_same_command_again_says_that_it_is_complete(s3: Any, llm: Path, here: Path) -> None:
    command = [str(llm), "s3://bucket/llm", "--format", "fp8"]
    first = CliRunner().invoke(cli, command)
    assert first.exit_code == 0, first.output
    before = stored(s3, "bucket/llm")
    again = CliRunner().invoke(cli, command)
    assert again.exit_code == 0, again.output
    assert again.output.startswith("Complete: this command was done before.")
    assert again.output.splitlines()[-1] == first.output.splitlines()[-1]  # the hash
    assert stored(s3, "bucket/llm") == before
    assert [*here.iterdir()] == []
    shutil.copytree(llm, here / "other")
    shard = min((here / "other").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(PublishError, match=r"(?s)already; .*s3://bucket/llm: holds another result"):
        api.convert(here / "other", "s3://bucket/llm", format="fp8")
    s3.rm("bucket/llm/model-00002-of-00003.safetensors")
    with pytest.raises(PublishError, match=r"s3://bucket/llm/model-00002-of-00003.safetensors: is missing"):
        api.convert(llm, "s3://bucket/llm", format="fp8")


def test_a_bucket_that_is_not_there_is_said(s3: Any, llm: Path, here: Path) -> None:
    with pytest.raises(PublishError, match=r"s3://other/llm"):
        api.convert(llm, "s3://other/llm", format="fp8")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("output", "others", "match"),
    [
        ("memory://out/llm", {"part": "1/2"}, "--part, --finalize"),
        ("memory://out/llm", {"push_to_hub": "me/llm"}, "--push-to-hub"),
        ("hf://me/llm", {}, "--push-to-hub"),
        ("nowhere://me/llm", {}, "nowhere"),
    ],
)
def test_what_can_not_be_uploaded_is_refused(llm: Path, output: str, others: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        api.convert(llm, output, format="fp8", **others)


@pytest.mark.usefixtures("here")
def test_any_file_system_of_fsspec_will_do(llm: Path, tmp_path: Path) -> None:
    api.convert(llm, "memory://out/any", format="mxfp4")
    convert(llm, tmp_path / "local", format="mxfp4")
    assert stored(fsspec.filesystem("memory"), "/out/any") == folder_bytes(tmp_path / "local")


@pytest.mark.slow
def test_a_large_file_is_sent_in_parts(s3: Any, tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(120 * 2**20)
    StoreFolder(UrlRef("s3://bucket/large")).put(tmp_path / "large", "model.safetensors")
    s3.invalidate_cache()
    assert "-" in s3.info("bucket/large/model.safetensors")["ETag"]  # so S3 tells what came in parts
