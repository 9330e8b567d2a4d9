"""The price list: exact costs, and a file that becomes wrong does not stop the ledger."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backbone.secret_files import ConfigurationError
from gateway.usage.prices import NANO, PriceFile
from tests.unit.gateway.usage.sample import event

PRICES = """
currency = "eur"
[[prices]]
model = "smol*"
input_per_1m = 0.15
cached_per_1m = 0.075
output_per_1m = 0.6
[[prices]]
model = "sd-*"
per_image = 0.02
per_slot_second = 0.0003
[[prices]]
model = "*"
per_audio_second = 0.0001
"""


def test_the_first_matching_entry_holds(tmp_path: Path) -> None:
    """Tokens by their kind, images, seconds of audio and of slots; exact to a billionth."""
    file = tmp_path / "prices.toml"
    file.write_text(PRICES)
    prices = PriceFile(str(file))
    tokens = event(input_tokens=1_000_000, cached_tokens=400_000, output_tokens=3)
    assert prices.price(tokens) == (int(0.12 * NANO) + 1800, "eur")
    assert prices.price(event(model="sd-xl", images=3)) == (int(0.0606 * NANO), "eur")
    assert prices.price(event(model="whisper", audio_ms=1500)) == (150_000, "eur")
    assert PriceFile("").price(tokens) == (0, "")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """A new price holds from the next batch on; a wrong file leaves the last one valid."""
    file = tmp_path / "prices.json"
    file.write_text('{"currency": "usd", "prices": [{"model": "*", "per_image": 1}]}')
    prices = PriceFile(str(file))
    picture = event(images=1)
    assert prices.price(picture) == (NANO, "usd")
    for content, cost in (
        ('{"currency": "usd", "prices": [{"model": "*", "per_image": 2.5}]}', 2.5),
        ('{"currency": "usd", "prices": [{"model": "*", "per_image": -1}]}', 2.5),
        ("nonsense", 2.5),
    ):
        file.write_text(content)
        os.utime(file, ns=(0, len(content)))
        prices.refresh()
        assert prices.price(picture) == (cost * NANO, "usd")


@pytest.mark.parametrize(
    "content",
    ["", "currency = 5", 'currency = "usd"\nprice = 1', 'currency = "usd"\n[[prices]]\nmodel = "*"\nper_image = -1'],
)
def test_a_wrong_file_is_refused_at_the_start(tmp_path: Path, content: str) -> None:
    """The operator learns it before the gateway serves."""
    file = tmp_path / "prices.toml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="LEDGER_PRICES_FILE"):
        PriceFile(str(file))
    with pytest.raises(ConfigurationError, match="LEDGER_PRICES_FILE"):
        PriceFile(str(tmp_path / "missing.toml"))
