"""Fixtures that more than one test file needs."""

import pytest


@pytest.fixture
def own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quantizers be registered in copies of the libraries' tables: other tests meet the libraries as they are."""
    import diffusers.quantizers.auto
    import transformers.quantizers.auto

    for auto in (diffusers.quantizers.auto, transformers.quantizers.auto):
        for table in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            monkeypatch.setattr(auto, table, dict(getattr(auto, table)))
