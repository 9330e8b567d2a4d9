"""Advice for unknown paths."""

from __future__ import annotations

import pytest

from gateway.http.error_handlers import path_hint


@pytest.mark.parametrize("path", ["/chat/completions", "/models", "/embeddings", "/audio/speech"])
def test_a_base_url_without_its_prefix(path: str) -> None:
    """The most usual mistake of all."""
    assert path_hint(path) == ": the base URL of the client must end in /v1"


def test_a_base_url_with_its_prefix_twice() -> None:
    """The client adds it too."""
    assert "twice" in path_hint("/v1/v1/models")


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/metrics"])
def test_a_path_of_the_observability_port(path: str) -> None:
    """The setting is named."""
    assert "OBSERVABILITY_PORT" in path_hint(path)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/moderations", "/favicon.ico", "/wp-login.php", "//"])
def test_other_paths_get_no_advice(path: str) -> None:
    """Nobody knows what was meant."""
    assert not path_hint(path)
