"""Tell how to install an optional part of Nexus, for the way in which Nexus was installed."""

from __future__ import annotations

import sys
from pathlib import Path

DISTRIBUTION = "nexus-inference-gateway"
"""The name of Nexus for pip and uv. In the package index, `nexus` is another project."""


def install_hint(extra: str, root: Path | None = None) -> str:
    """Return the command that installs an extra of pyproject.toml. It holds no path of this machine, because callers may read it.

    `root`: the folder that holds Nexus's packages. None: the folder of this module.
    """
    root = root or Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    if (root / ".venv" / "bin" / "uv").is_file() and Path(sys.prefix) == root / ".venv":
        return f".venv/bin/uv sync --frozen --inexact --extra {extra} (in Nexus's folder)"
    return f"pip install -e '.[{extra}]' (in Nexus's folder)"
