"""The bootstrap key in a file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from pydantic import SecretStr

from backbone.secret_files import ConfigurationError
from backbone.settings import GatewaySettings
from cli.gateway_client import find_target
from cli.stack.data_dir import DataDir
from gateway.auth.bootstrap_key import load_bootstrap_key


def settings(file: Path | str, key: str | None = None) -> GatewaySettings:
    return GatewaySettings(
        _env_file=None,
        gateway_bearer_token=None if key is None else SecretStr(key),
        gateway_bearer_token_file=str(file),
    )


def test_a_missing_file_is_created_once(tmp_path: Path):
    """The first start makes a key that only its owner can read; the next start has the same."""
    file = tmp_path / "key"
    key = load_bootstrap_key(settings(file))
    assert key.startswith("nexus-")
    assert len(key) > 30
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_bootstrap_key(settings(file)) == key
    assert [path.name for path in tmp_path.iterdir()] == ["key"], "nothing else is left there"


def test_gateways_that_start_concurrently_share_one_key(tmp_path: Path):
    """No matter who makes the file first, all read the same."""
    for turn in range(20):
        file, together = tmp_path / f"key{turn}", Barrier(8)

        def start(file: Path = file, together: Barrier = together) -> str:
            together.wait()
            return load_bootstrap_key(settings(file))

        with ThreadPoolExecutor(8) as pool:
            keys = {each.result() for each in [pool.submit(start) for _ in range(8)]}
        assert len(keys) == 1
        assert keys == {file.read_text().strip()}


def test_the_setting_takes_precedence(tmp_path: Path):
    """And no file is made."""
    assert load_bootstrap_key(settings(tmp_path / "key", "mine")) == "mine"
    assert not (tmp_path / "key").exists()


def test_an_empty_setting_counts_as_unset(tmp_path: Path):
    """`GATEWAY_BEARER_TOKEN=` in a file of settings sets no key."""
    assert load_bootstrap_key(settings(tmp_path / "key", "")).startswith("nexus-")
    assert load_bootstrap_key(settings("", "")) == ""


@pytest.mark.parametrize("kept", ["", "\n"])
def test_an_empty_file_is_rejected(tmp_path: Path, kept: str):
    """An empty key would be everybody's; the setting is named."""
    (tmp_path / "key").write_text(kept)
    with pytest.raises(ConfigurationError, match=r"GATEWAY_BEARER_TOKEN_FILE.*is empty"):
        load_bootstrap_key(settings(tmp_path / "key"))


def test_a_file_that_cannot_be_created_is_named(tmp_path: Path):
    """The operator learns which setting and which path."""
    with pytest.raises(ConfigurationError, match=r"GATEWAY_BEARER_TOKEN_FILE.*gone/key.*No such file"):
        load_bootstrap_key(settings(tmp_path / "gone" / "key"))


def test_the_console_uses_the_key_of_the_gateway_on_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`docker compose exec gateway nexus status` needs no key."""
    for name in ("NEXUS_API_KEY", "GATEWAY_BEARER_TOKEN", "NEXUS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GATEWAY_BEARER_TOKEN_FILE", str(tmp_path / "key"))
    assert find_target(None, None, DataDir(tmp_path)).key == ""
    key = load_bootstrap_key(settings(tmp_path / "key"))
    assert find_target(None, None, DataDir(tmp_path)).key == key
    assert find_target(None, "given", DataDir(tmp_path)).key == "given"
