"""A folder that fsspec opens as SOURCE: the same bytes, from memory and from a real S3 server on loopback (moto's)."""

import platform
import sys
from pathlib import Path

import fsspec
import pytest

from run_ckpt.contract.errors import CheckpointError, FetchError, UsageError
from tests.checkpoints import convert, folder_bytes
from tests.hub_fixtures import assert_same_but_for_the_source, convert_remote, make_llm
from tests.test_gguf import write as write_gguf


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return make_llm(tmp_path / "llm", n_shards=3)


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_bucket_gives_the_bytes_of_the_local_copy(
    s3: fsspec.AbstractFileSystem, llm: Path, tmp_path: Path, weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert_ckpt.source.download._PART_NBYTES", 400_000)
    s3.put(str(llm), "bucket/models/llm", recursive=True)
    convert_remote("s3://bucket/models/llm/", tmp_path / "out", format=weight_format)
    convert(llm, tmp_path / "local", format=weight_format)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "local")
    assert {path.name for path in tmp_path.iterdir()} == {"llm", "out", "local"}


def test_a_gguf_file_in_a_bucket_gives_the_bytes_of_the_local_copy(
    s3: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file, _ = write_gguf(tmp_path / "flux-Q4_K.gguf", quantized="Q4_K")
    s3.put(str(file), "bucket/flux-Q4_K.gguf")
    convert_remote("s3://bucket/flux-Q4_K.gguf", tmp_path / "out", format="fp8", preset=None)
    convert(file, tmp_path / "local", format="fp8", preset=None)
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")


def test_a_pipeline_in_memory_and_a_component_of_it(llm: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(llm), "/models/pipe/transformer", recursive=True)
    memory.pipe("/models/pipe/vae/model.safetensors", b"not looked at")
    memory.pipe("/models/pipe/model_index.json", b"{}")
    convert(llm, tmp_path / "local", format="mxfp4")
    convert_remote("memory://models/pipe", tmp_path / "whole", format="mxfp4")
    convert_remote("memory://models/pipe/transformer", tmp_path / "part", format="mxfp4")
    for output, component in ((tmp_path / "part", ""), (tmp_path / "whole", "transformer")):
        source = assert_same_but_for_the_source(output / component, tmp_path / "local")
        assert source["name"] == ("pipe/transformer" if component else "transformer")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"transformer"}


def test_a_file_url_is_a_path(llm: Path, tmp_path: Path) -> None:
    convert_remote(llm.as_uri(), tmp_path / "out", format="mxfp4")
    convert(llm, tmp_path / "local", format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "local")


def test_an_object_that_changes_during_the_run_is_noticed(
    s3: fsspec.AbstractFileSystem, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put(str(llm), "bucket/llm", recursive=True)
    shard = llm / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1

    def change(self: object, steps: object) -> None:
        s3.pipe(f"bucket/llm/{shard.name}", bytes(data))
        start(self, steps)

    from convert_ckpt.source.shards import FetchedShards

    start = FetchedShards.start
    with monkeypatch.context() as patch:
        patch.setattr(FetchedShards, "start", change)
        with pytest.raises(FetchError, match=r"00002-of-00003.safetensors: changed since the run began.*--restart"):
            convert_remote("s3://bucket/llm", tmp_path / "out", format="fp8")
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors.version was .*--restart"):
        convert_remote("s3://bucket/llm", tmp_path / "out", format="fp8")
    shard.write_bytes(data)
    convert_remote("s3://bucket/llm", tmp_path / "out", format="fp8", restart=True)
    convert(llm, tmp_path / "local", format="fp8")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "local")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing: not there"),
        ("s3://no-bucket/nothing", "s3://no-bucket/nothing: not there"),
        ("memory://nothing", "memory://nothing: not there"),
    ],
)
def test_what_is_not_there_is_named(s3: fsspec.AbstractFileSystem, tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        convert_remote(source, tmp_path / "out", format="mxfp4")
    assert not list(tmp_path.iterdir())


def test_missing_credentials_are_said_at_once(
    s3: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    type(s3).clear_instance_cache()
    with pytest.raises(FetchError, match=f"{platform.node()} has no credentials for it"):
        convert_remote("s3://bucket/llm", tmp_path / "out", format="fp8")


def test_a_server_that_does_not_answer_is_one_line(
    s3: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(FetchError, match=r"s3://bucket/llm: can't be read .*Gave up"):
        convert_remote("s3://bucket/llm", tmp_path / "out", format="mxfp4")


def test_an_unknown_scheme_and_a_missing_package_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="nosuch://: Protocol not known"):
        convert_remote("nosuch://x/y", tmp_path / "out", format="mxfp4")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r'pip install "convert-ckpt\[gs\]"'):
        convert_remote("gs://bucket/x", tmp_path / "out", format="mxfp4")


def test_only_the_hub_has_a_cache_to_keep_a_source_in(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only the Hub has a cache"):
        convert_remote("memory://x", tmp_path / "out", format="mxfp4", keep_source=True)
    with pytest.raises(UsageError, match="always stays"):
        convert_remote(str(llm), tmp_path / "out", format="mxfp4", keep_source=True)
