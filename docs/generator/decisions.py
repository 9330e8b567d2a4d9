"""The list of decisions, from their own headings."""

from __future__ import annotations

import re
from pathlib import Path

from docs.generator.markdown import NOTICE, table

FOLDER = Path(__file__).parents[1] / "adr"
INTRODUCTION = """
Each page has a context, a decision and its consequences. A decision that is overturned stays, and names its successor. A new one is the next
number, with a heading `# NUMBER TITLE`.

"""


def page() -> str:
    """Return docs/adr/README.md. Raises `ValueError` if a heading does not begin with the file's number."""
    rows = []
    for path in sorted(FOLDER.glob("[0-9]*.md")):
        number, _, title = path.read_text().partition("\n")[0].removeprefix("# ").partition(" ")
        if not re.fullmatch(r"\d{4}", number) or not path.name.startswith(number):
            raise ValueError(f"{path.name} must begin with the heading '# {path.name[:4]} TITLE'.")
        rows.append((f"[{number}]({path.name})", title))
    return "".join(["# Decisions\n\n", NOTICE, INTRODUCTION, table(["number", "decision"], rows)])
