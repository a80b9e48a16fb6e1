"""Fixtures that more than one test file needs."""

from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture
def own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quantizers be registered in copies of the libraries' tables: other tests meet the libraries as they are."""
    import diffusers.quantizers.auto
    import transformers.quantizers.auto

    for auto in (diffusers.quantizers.auto, transformers.quantizers.auto):
        for table in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            monkeypatch.setattr(auto, table, dict(getattr(auto, table)))


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """The S3 server, with its address and credentials where botocore looks for them."""
    set_credentials(monkeypatch, s3_endpoint)
    monkeypatch.setattr("convert_ckpt.source.store._FIRST_WAIT_SECONDS", 0.005)
    monkeypatch.setattr("convert_ckpt.source.store._TRIES", 2)
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.mkdir("bucket")
    yield filesystem
    filesystem.rm("bucket", recursive=True)
    fsspec.filesystem("s3").clear_instance_cache()


def set_credentials(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let this process, and those that it starts, talk to the S3 server at ``endpoint``."""
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "stand-in")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "stand-in")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
