"""The models that an OpenAI-style server holds in memory, where it loads and unloads them: llama.cpp's router, and llama-swap.

llama.cpp's router gives the state in each entry of `/v1/models`: `"status": {"value": "loaded"}`. llama-swap lists its processes at
`/running`; it does not load models that run elsewhere (peers, selectors, profiles).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

JSON = dict[str, Any]

LOADED_STATES, LOADING_STATES = frozenset({"loaded", "ready"}), frozenset({"loading", "starting"})
RESIDENT_STATES = LOADED_STATES | LOADING_STATES | {"sleeping"}
"""States in which a model occupies memory. A sleeping model has a process, and counts against `--models-max`."""
LLAMA_SWAP = "llama-swap"


def is_llama_swap(models: Iterable[JSON]) -> bool:
    """Return whether these entries of `/v1/models` are llama-swap's."""
    return any(model.get("owned_by") == LLAMA_SWAP for model in models)


def add_llama_swap_states(models: list[JSON], running: Any) -> list[JSON]:
    """Return llama-swap's entries with the states of `/running` as their status; None for models that run elsewhere."""
    listed = running.get("running") if isinstance(running, dict) else None
    processes = [one for one in listed or () if isinstance(one, dict)] if isinstance(listed, list) else []
    states = {str(one.get("model")): str(one.get("state")) for one in processes}
    return [
        model | {"status": {"value": states.get(str(model["id"]), "unloaded")} if _is_local(model) else None}
        for model in models
    ]


def _is_local(model: JSON) -> bool:
    meta = model.get("meta")
    own = meta.get("llamaswap") if isinstance(meta, dict) else None
    return not isinstance(own, dict) or own.get("type") in (None, "model")


def model_state(model: JSON) -> str | None:
    """Return the model's state; None where the server gives none."""
    status = model.get("status")
    value = status.get("value") if isinstance(status, dict) else None
    return value if isinstance(value, str) else None


def resident_models(models: Iterable[JSON]) -> frozenset[str] | None:
    """Return the models that are in memory or being loaded; None where the server gives no states."""
    states = {str(model["id"]): model_state(model) for model in models}
    if all(state is None for state in states.values()):
        return None
    return frozenset(name for name, state in states.items() if state in RESIDENT_STATES)
