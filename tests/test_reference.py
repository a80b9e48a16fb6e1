"""What SOURCE names."""

from pathlib import Path

import pytest

from run_ckpt.contract.errors import UsageError
from run_ckpt.storage.reference import HubRef, UrlRef, parse_reference


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


PAGE = "https://huggingface.co/owner/name"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (PAGE, HubRef("owner/name", None, "")),
        (f"{PAGE}/", HubRef("owner/name", None, "")),
        (f"{PAGE}?library=diffusers", HubRef("owner/name", None, "")),
        (f"{PAGE}/tree/main", HubRef("owner/name", "main", "")),
        (f"{PAGE}/tree/main/transformer", HubRef("owner/name", "main", "transformer")),
        (f"{PAGE}/tree/refs%2Fpr%2F3/a%20b", HubRef("owner/name", "refs/pr/3", "a b")),
        (f"{PAGE}/tree/refs/pr/3/transformer", HubRef("owner/name", "refs/pr/3", "transformer")),
        (f"{PAGE}/blob/v1.0/model.safetensors", HubRef("owner/name", "v1.0", "model.safetensors")),
        (f"{PAGE}/resolve/main/a/b.safetensors?download=true", HubRef("owner/name", "main", "a/b.safetensors")),
    ],
)
def test_a_page_of_the_hub_names_its_repo(page: str, expected: HubRef) -> None:
    assert parse_reference(page) == expected


def test_a_page_of_the_hub_that_is_configured_names_its_repo(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org")
    assert parse_reference("https://hub.example.org/owner/name/tree/main") == HubRef("owner/name", "main", "")
    assert parse_reference(PAGE) == HubRef("owner/name", None, "")
    assert parse_reference("https://example.org/owner/name") == UrlRef("https://example.org/owner/name")


@pytest.mark.parametrize("page", ["https://huggingface.co/owner", f"{PAGE}/discussions/3", f"{PAGE}/commit/abc"])
def test_other_pages_of_the_hub_are_refused(page: str) -> None:
    with pytest.raises(UsageError, match="names no model of the Hub"):
        parse_reference(page)


@pytest.mark.parametrize(
    "source",
    [
        "https://huggingface.co/datasets/owner/name",
        "hf://name",
        "hf://",
        "hf://datasets/owner/name",
        "hf://owner/name@",
    ],
)
def test_what_names_no_model_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="names no model of the Hub"):
        parse_reference(source)


def test_a_url_is_shown_without_password_and_signature() -> None:
    assert str(UrlRef("ftp://me:secret@host/x?sig=secret")) == "ftp://host/x"
