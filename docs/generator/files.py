"""The generated files and their texts."""

from __future__ import annotations

from pathlib import Path

from docs.generator import adapters, cli, decisions, log_events, metrics, routes, settings

ROOT = settings.ROOT
REFERENCE = ROOT / "docs" / "reference"


def generated() -> dict[Path, str]:
    """Return the text that each generated file must have."""
    return {
        REFERENCE / "routes.md": routes.page(),
        REFERENCE / "metrics.md": metrics.page(),
        REFERENCE / "log-events.md": log_events.page(),
        REFERENCE / "adapters.md": adapters.page(),
        REFERENCE / "cli.md": cli.page(),
        REFERENCE / "settings.md": settings.page(),
        decisions.FOLDER / "README.md": decisions.page(),
        settings.EXAMPLE: settings.example(),
        settings.CHART_SCHEMA: settings.chart_schema(),
    }
