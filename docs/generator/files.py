"""The generated files and their generators."""

from __future__ import annotations

from docs.generator import adapters, cli, decisions, log_events, metrics, routes, settings

ROOT = settings.ROOT
REFERENCE = ROOT / "docs" / "reference"
GENERATORS = {
    REFERENCE / "routes.md": routes.page,
    REFERENCE / "metrics.md": metrics.page,
    REFERENCE / "log-events.md": log_events.page,
    REFERENCE / "adapters.md": adapters.page,
    REFERENCE / "cli.md": cli.page,
    REFERENCE / "settings.md": settings.page,
    decisions.FOLDER / "README.md": decisions.page,
    settings.EXAMPLE: settings.example,
    settings.CHART_SCHEMA: settings.chart_schema,
}
"""For each generated file, the function that returns the text that the file must have."""
