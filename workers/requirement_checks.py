"""Checks of an adapter's requirements on the worker's machine."""

from __future__ import annotations

from schemas.presence import ModelOffer
from workers.backends.base import Backend, BackendUnavailable, Requirement


class RequirementMissing(BackendUnavailable):
    """The worker's machine lacks a library or program that its adapter needs."""


def missing_requirements(backend: Backend) -> list[tuple[Requirement, str]]:
    """Return the missing optional requirements, each with its problem. Raises RequirementMissing for the others."""
    missing = [(one, problem) for one in backend.requirements() if (problem := one.problem()) is not None]
    if required := [problem for one, problem in missing if not one.optional]:
        raise RequirementMissing(f"The {backend.name} adapter cannot work yet. {' '.join(required)}")
    return missing


def optional_problems(missing: list[tuple[Requirement, str]], models: tuple[ModelOffer, ...]) -> tuple[str, ...]:
    """Return the problems of the requirements that matter to these models."""
    served = {capability for model in models for capability in model.capabilities}
    return tuple(problem for one, problem in missing if not one.capabilities or served & set(one.capabilities))
