"""What SOURCE names."""

from pathlib import Path

import pytest

from convert_ckpt.source.reference import HubRef, UrlRef, parse_reference
from run_ckpt.contract.errors import UsageError


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", HubRef("owner/name", None, "")),
        ("owner/name@main", HubRef("owner/name", "main", "")),
        ("owner/name@feature%2Fx", HubRef("owner/name", "feature/x", "")),
        ("owner/FLUX.2-dev@v1.0", HubRef("owner/FLUX.2-dev", "v1.0", "")),
        ("hf://owner/name", HubRef("owner/name", None, "")),
        ("hf://models/owner/name/", HubRef("owner/name", None, "")),
        ("hf://owner/name@abc/transformer", HubRef("owner/name", "abc", "transformer")),
        ("hf://owner/name@refs/pr/3/a/b.safetensors", HubRef("owner/name", "refs/pr/3", "a/b.safetensors")),
        ("hf://owner/name@feature%2Fx", HubRef("owner/name", "feature/x", "")),
        ("s3://bucket/prefix/", UrlRef("s3://bucket/prefix")),
        ("memory://x", UrlRef("memory://x")),
        ("file:///a%20b/c", Path("/a b/c")),
        ("/owner/name", Path("/owner/name")),
        ("./owner/name", Path("owner/name")),
        ("a/b/c", Path("a/b/c")),
        ("name", Path("name")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_source_is_a_path_a_repo_or_a_url(source: str, expected: object) -> None:
    assert parse_reference(source) == expected


def test_a_path_that_exists_wins_over_a_repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_reference("owner/name") == Path("owner/name")


@pytest.mark.parametrize("source", ["hf://name", "hf://", "hf://datasets/owner/name", "hf://owner/name@"])
def test_what_names_no_model_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="names no model of the Hub"):
        parse_reference(source)


def test_a_url_is_shown_without_password_and_signature() -> None:
    assert str(UrlRef("ftp://me:secret@host/x?sig=secret")) == "ftp://host/x"
