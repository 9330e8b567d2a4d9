"""How adapters are found, and how their errors are told."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from schemas.errors import InvalidRequest, NotFound
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendUnavailable,
    load_adapters,
    make_backend,
    wrap_exception,
)


def test_every_adapter_in_the_folder_is_found() -> None:
    assert {"echo", "openai"} <= set(load_adapters())


def test_every_adapter_has_the_name_of_its_module() -> None:
    """So that a worker imports its own adapter and no other."""
    ours = {kind.__module__: name for name, kind in load_adapters().items() if kind.__module__.startswith("workers.")}
    assert {module: module.split(".")[2] for module in ours} == ours


def test_two_adapters_of_one_name_are_refused() -> None:
    load_adapters()
    with pytest.raises(TypeError, match="echo"):
        type("Second", (Backend,), {"name": "echo"})


def test_a_class_without_a_name_is_no_adapter() -> None:
    before = set(Backend.adapters)
    type("Helper", (Backend,), {})
    assert set(Backend.adapters) == before


def test_an_adapter_that_does_not_import_is_an_error() -> None:
    def broken(name: str) -> object:
        raise ImportError(name)

    with pytest.raises(ImportError):
        load_adapters(broken)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(NotFound, match=r"echo, .*openai"):
        make_backend("nonsense", BackendConfig())


def test_a_foreign_exception_becomes_a_502_that_names_it() -> None:
    wrapped = wrap_exception(KeyError("x"))
    assert isinstance(wrapped, BackendError)
    assert wrapped.info.status == 502
    assert "KeyError" in wrapped.info.message
    assert not wrapped.transient


def test_our_own_exceptions_stay_as_they_are() -> None:
    for error in (InvalidRequest("x"), BackendUnavailable("y")):
        assert wrap_exception(error) is error


def test_every_adapter_is_held_apart_from_the_others() -> None:
    """The import contract holds whatever stands in the adapters' folder, so that a new adapter needs no word in it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    [held] = [one["modules"] for one in contracts if one["type"] == "independence"]
    assert held == ["workers.backends.*"]
    ours = {kind.__module__ for kind in load_adapters().values() if kind.__module__.startswith("workers.")}
    assert {module.rsplit(".", module.count(".") - 1)[0] for module in ours} == {"workers.backends"}
