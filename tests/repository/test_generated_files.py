"""References, `.env.example` and the chart's schema are what their generator writes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from docs.generator.files import GENERATORS, ROOT
from docs.generator.settings import CHART_SCHEMA


@pytest.mark.parametrize("path", GENERATORS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_generated_file_is_as_its_generator_writes_it(path: Path) -> None:
    """A setting, metric, command or route that changed is in its reference."""
    assert path.read_text() == GENERATORS[path](), "run: .venv/bin/python -m docs.generator"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"LOG_LEVEL": "debug", "MAX_QUEUED_JOBS": 50000, "FETCH_MEDIA": True, "ACK_WAIT_S": "20"}, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, None),
        ({"LOG_LEVEL": "loud"}, "'loud' is not one of"),
        ({"MAX_QUEUED_JOBS": "many"}, "does not match"),
        ({"GATEWAY_PORT": 70000}, "greater than the maximum"),
        ({"max_queued_jobs": 1}, "does not match"),
    ],
)
def test_the_chart_refuses_a_value_that_the_gateway_would_refuse(
    settings: dict[str, object], error: str | None
) -> None:
    """Before anything is installed."""
    values = {"gateway": {"settings": settings}}
    schema = json.loads(CHART_SCHEMA.read_text())
    if error is None:
        jsonschema.validate(values, schema)
    else:
        with pytest.raises(jsonschema.ValidationError, match=error):
            jsonschema.validate(values, schema)
