"""Hooks of the docs site: point links that leave docs/ to the repository's page of that file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/gevanoff/nexus/blob/main"
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page's text, with links to files outside of docs/ made absolute.

    In the repository such a link is relative, so that it works there and `tests/repository` can check it.
    """
    folder = Path("docs", page.file.src_uri).parent

    def absolute(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[2])
        if Path(target).parts[0] == "docs":
            return link[0]
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which does not exist.")
        return f"{link[1]}{REPOSITORY}/{target}{link[3] or ''})"

    return LINK.sub(absolute, markdown)
