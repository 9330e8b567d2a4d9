"""An adapter's options as one string, `NAME=value,NAME=value`, as `WORKER_BACKEND_OPTIONS` holds them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable


def split_options(text: str) -> dict[str, str]:
    """Parse options. One that holds a comma stands in double quotes: `"command=say -v a,b",output=wav`."""
    fields = next(csv.reader([text], skipinitialspace=True), [])
    pairs = [field.partition("=") for field in fields if field.strip()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def join_options(options: Iterable[str]) -> str:
    """Join options, each `NAME=value`; the inverse of `split_options`."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(options)
    return line.getvalue()
