"""Measure requests in the units of budgets: by an estimate before they run, and by their usage events afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gateway.limits.tokens import BYTES_PER_TOKEN, estimate_tokens
from schemas.jobs import Capability
from schemas.usage import FIELDS

FIRST_SLOT_SECONDS = 1.0
"""Estimate for a model of which no request has ended at this gateway."""
MEAN_WEIGHT = 1 / 8
"""Weight of the newest request in the mean time of a model."""
MAX_MODELS = 1024
"""Models whose times are remembered."""

_MODEL, _PUBLIC_MODEL = FIELDS.index("model"), FIELDS.index("public_model")
_INPUT, _OUTPUT, _CACHED = (FIELDS.index(f"{name}_tokens") for name in ("input", "output", "cached"))
_IMAGES, _AUDIO_MS, _SLOT_US = FIELDS.index("images"), FIELDS.index("audio_ms"), FIELDS.index("slot_us")


class UnitPrices(NamedTuple):
    """The prices of one model as floating-point numbers, in the currency's unit."""

    input_token: float
    cached_token: float
    output_token: float
    image: float
    audio_second: float
    slot_second: float


Amounts = tuple[float, float, float]
"""What requests take: tokens, slot-seconds and cost."""
NOTHING: Amounts = (0.0, 0.0, 0.0)
LEAST: Amounts = (1.0, 0.001, 1e-9)
"""The least estimate: a budget that is used up admits no request, also where its use cannot be estimated."""


class _Model:
    __slots__ = ("name", "slot_seconds")

    def __init__(self, name: str) -> None:
        self.name = name
        self.slot_seconds = FIRST_SLOT_SECONDS


class BudgetMeter:
    """Measures requests. It learns how long the requests of each model take."""

    def __init__(
        self, prices_of: Callable[[str], UnitPrices | None] = lambda _: None, currency: Callable[[], str] = lambda: ""
    ) -> None:
        """`prices_of`: returns the prices of a model; None: it costs nothing."""
        self._prices_of = prices_of
        self.currency = currency
        """Returns the currency of the prices."""
        self._models: dict[str, _Model] = {}
        """By the name that callers use."""

    def estimate(self, capability: Capability, request: Any, size: int, tokens_only: bool) -> Amounts:
        """Return the estimate for a request. `size`: bytes of the body; `request`: validated by its endpoint's schema."""
        tokens = estimate_tokens(capability, request, size)
        if tokens_only:
            return tokens or 1.0, 0.0, 0.0
        name = getattr(request, "model", None) or ""
        model = self._models.get(name)
        seconds = FIRST_SLOT_SECONDS if model is None else model.slot_seconds
        prices = self._prices_of(name if model is None else model.name)
        if prices is None:
            return tokens or LEAST[0], seconds, LEAST[2]
        prompt = min(tokens, size // BYTES_PER_TOKEN)
        images = getattr(request, "n", None) or 1 if capability is Capability.IMAGES else 0
        cost = (
            prompt * prices.input_token
            + (tokens - prompt) * prices.output_token
            + images * prices.image
            + seconds * prices.slot_second
        )
        return tokens or LEAST[0], seconds, cost or LEAST[2]

    def measure(self, values: tuple[Any, ...], tokens_only: bool) -> Amounts:
        """Return what a finished run has used. `values`: its usage event, in the order of `schemas.usage.FIELDS`."""
        tokens = values[_INPUT] + values[_OUTPUT]
        if tokens_only:
            return tokens, 0.0, 0.0
        seconds = values[_SLOT_US] / 1e6
        if seconds:
            self._learn(values[_PUBLIC_MODEL], values[_MODEL], seconds)
        prices = self._prices_of(values[_MODEL])
        if prices is None:
            return tokens, seconds, 0.0
        cached = min(values[_CACHED], values[_INPUT])
        cost = (
            (values[_INPUT] - cached) * prices.input_token
            + cached * prices.cached_token
            + values[_OUTPUT] * prices.output_token
            + values[_IMAGES] * prices.image
            + values[_AUDIO_MS] / 1000 * prices.audio_second
            + seconds * prices.slot_second
        )
        return tokens, seconds, cost

    def _learn(self, public_model: str, name: str, seconds: float) -> None:
        model = self._models.get(public_model)
        if model is None:
            if len(self._models) >= MAX_MODELS:
                self._models.clear()
            model = self._models[public_model] = _Model(name)
            model.slot_seconds = seconds
        model.name = name
        model.slot_seconds += (seconds - model.slot_seconds) * MEAN_WEIGHT
