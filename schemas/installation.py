"""How to add what an optional part of Nexus needs, in words that work for the way in which Nexus was installed."""

from __future__ import annotations

import sys
from pathlib import Path

DISTRIBUTION = "nexus-inference-gateway"
"""The name under which pip and uv know Nexus. `nexus` alone is another project's name in the package index."""


def install_hint(extra: str, root: Path | None = None) -> str:
    """Return the command that adds one extra of pyproject.toml. It holds no path of this machine: callers may read it.

    `root`: the folder that holds Nexus's packages; None: where they are.
    """
    root = root or Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    if (root / ".venv" / "bin" / "uv").is_file() and Path(sys.prefix) == root / ".venv":
        return f".venv/bin/uv sync --frozen --inexact --extra {extra} (in Nexus's folder)"
    return f"pip install -e '.[{extra}]' (in Nexus's folder)"
