"""Descriptors of models that depend on more than their offers: built once for each state of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from schemas.descriptors import EndpointDescriptor, ModelDescriptor

MAX_MODELS = 4096


class DescriptorCache:
    """Holds the newest descriptor of each model, so that an unchanged model has the same object after each discovery."""

    def __init__(self) -> None:
        self._built: OrderedDict[str, tuple[Any, ModelDescriptor]] = OrderedDict()

    def get(self, model: str, state: Any, build: Callable[[], dict[str, EndpointDescriptor]]) -> ModelDescriptor:
        """Return the model's descriptor for `state`, which is compared. `build` returns its endpoints by path."""
        known = self._built.get(model)
        if known is None or known[0] != state:
            known = self._built[model] = (state, ModelDescriptor(endpoints=build()))
        self._built.move_to_end(model)
        if len(self._built) > MAX_MODELS:
            self._built.popitem(last=False)
        return known[1]
