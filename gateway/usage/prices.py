"""The operator's price list: a TOML or JSON file.

    currency = "usd"

    [[prices]]                   # the first entry whose `model` matches holds
    model = "llama-*"            # a glob over the model's name
    input_per_1m = 0.15          # tokens of the prompt
    cached_per_1m = 0.075        # those of them that the server had cached; without it as `input_per_1m`
    output_per_1m = 0.60
    per_image = 0.02
    per_audio_second = 0.0001
    per_slot_second = 0.0003

Money is counted in billionths of the currency's unit, rounded once per request.
"""

from __future__ import annotations

import json
import tomllib
from decimal import ROUND_HALF_EVEN, Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from backbone.secret_files import ConfigurationError
from gateway.limits.budget_meter import UnitPrices
from schemas.usage import UsageEvent

log = structlog.get_logger(__name__)

Price = Annotated[Decimal, Field(ge=0, le=1_000_000)]
NANO = 1_000_000_000
MAX_REMEMBERED = 1024
"""Models whose prices are remembered."""
MAX_NANOS = 2**50
"""A million: what one request costs at most."""


class ModelPrice(BaseModel):
    """The prices of the models whose names match a glob."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    input_per_1m: Price = Decimal(0)
    cached_per_1m: Price | None = None
    output_per_1m: Price = Decimal(0)
    per_image: Price = Decimal(0)
    per_audio_second: Price = Decimal(0)
    per_slot_second: Price = Decimal(0)

    def cost_nanos(self, event: UsageEvent) -> int:
        """Return what the event costs, in billionths."""
        cached = min(event.cached_tokens, event.input_tokens)
        cached_price = self.input_per_1m if self.cached_per_1m is None else self.cached_per_1m
        per_million = (
            (event.input_tokens - cached) * self.input_per_1m
            + cached * cached_price
            + event.output_tokens * self.output_per_1m
            + event.slot_us * self.per_slot_second
        )
        units = per_million / 1_000_000 + event.images * self.per_image + self.per_audio_second * event.audio_ms / 1000
        return min(int((units * NANO).to_integral_value(ROUND_HALF_EVEN)), MAX_NANOS)

    def unit_prices(self) -> UnitPrices:
        """Return the prices for estimates."""
        cached = self.input_per_1m if self.cached_per_1m is None else self.cached_per_1m
        return UnitPrices(
            float(self.input_per_1m) / 1e6,
            float(cached) / 1e6,
            float(self.output_per_1m) / 1e6,
            float(self.per_image),
            float(self.per_audio_second),
            float(self.per_slot_second),
        )


class PriceList(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: Annotated[str, StringConstraints(pattern=r"^[a-z]{3}$")]
    """ISO 4217's code in lower case."""
    prices: tuple[ModelPrice, ...] = ()

    def price(self, event: UsageEvent) -> tuple[int, str]:
        """Return the cost of an event in billionths, and the currency. A model without a price costs nothing."""
        for entry in self.prices:
            if fnmatchcase(event.model, entry.model):
                return entry.cost_nanos(event), self.currency
        return 0, self.currency

    def unit_prices(self, model: str) -> UnitPrices | None:
        """Return the prices of a model; None: it costs nothing."""
        return next((entry.unit_prices() for entry in self.prices if fnmatchcase(model, entry.model)), None)


class PriceFile:
    """Reads the price list, and again when the file has changed. A file that became wrong leaves the last prices valid."""

    def __init__(self, path: str) -> None:
        """`path`: empty for no prices. Raises ConfigurationError."""
        self._path = Path(path) if path else None
        self._read_at: tuple[int, int] | None = None
        self._list: PriceList | None = None
        self._units: dict[str, UnitPrices | None] = {}
        if self._path is not None:
            try:
                self._read_at = self._state(self._path)
                self._list = read_prices(self._path)
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"LEDGER_PRICES_FILE: {path}: {_reason(error)}") from error

    def price(self, event: UsageEvent) -> tuple[int, str]:
        """Return the cost of an event in billionths, and the currency; without a price list 0 and an empty text."""
        return (0, "") if self._list is None else self._list.price(event)

    @property
    def currency(self) -> str:
        """The currency of the price list; empty without one."""
        return "" if self._list is None else self._list.currency

    def unit_prices(self, model: str) -> UnitPrices | None:
        """Return the prices of a model; None: it costs nothing."""
        units = self._units
        try:
            return units[model]
        except KeyError:
            if len(units) >= MAX_REMEMBERED:
                units.clear()
            found = units[model] = None if self._list is None else self._list.unit_prices(model)
            return found

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        if self._path is None:
            return
        try:
            state = self._state(self._path)
            if state == self._read_at:
                return
            self._read_at = state
            self._list, self._units = read_prices(self._path), {}
            log.info("ledger.prices_read", file=str(self._path), prices=len(self._list.prices))
        except (OSError, ValueError) as error:
            log.error("ledger.prices_wrong", file=str(self._path), error=_reason(error))

    @staticmethod
    def _state(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_mtime_ns, found.st_size


def read_prices(path: Path) -> PriceList:
    """Read a price list. Raises OSError, and ValueError for a wrong one."""
    text = path.read_text("utf-8")
    if path.suffix == ".json":
        return PriceList.model_validate(json.loads(text, parse_float=Decimal))
    return PriceList.model_validate(tomllib.loads(text, parse_float=Decimal))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
