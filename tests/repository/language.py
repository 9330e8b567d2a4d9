"""Check the language of the source: unique class names, and a short list of words that Nexus does not use.

`make check` runs it as `python -m tests.repository.language`. It prints each finding with its file and line, and the word to use instead.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("schemas/", "backbone/", "gateway/", "workers/", "cli/")
READ = (".py", ".md", ".yml", ".yaml", ".toml", ".example", ".sh")
# Other people's words: recorded answers of servers, decisions as they were written, and what each release said.
NOT_OURS = ("tests/backends/shapes/", "docs/adr/", "CHANGELOG.md", "tests/repository/language.py", "uv.lock")

WORDS = {
    r"whoever": "name the caller, worker, gateway or operator",
    r"whosoever|whomever": "name the caller, worker, gateway or operator",
    r"for ever": "forever",
    r"anew": "again",
    r"thereof|therein|hitherto": "name the thing",
    r"referee\w*": "attempt gate",
    r"leave to begin": "start grant",
    r"front door": "gateway",
    r"undecide": "delete_outcome",
    r"catalogues?": "catalog",
    r"behaviour\w*": "behavior",
    r"colour\w*": "color",
    r"licence\w*": "license",
    r"favour\w*": "favor",
    r"honour\w*": "honor",
    r"(?:serial|recogn|optim|normal|organ|initial|author)is(?:e|es|ed|ing|er|ation)": "-ize",
}
"""A regular expression of whole words, in any case, and what to write instead."""

WIRE_NAMES = {("schemas/jobs.py", "kept")}
"""Fields whose names other versions of Nexus read."""

NAMES = {
    "told",
    "heard",
    "gone",
    "asked",
    "said",
    "kept",
    "held",
    "shown",
    "rang",
    "bell",
    "bells",
    "wish",
    "wishes",
    "vitals",
    "bury",
    "again",
}
"""Words that are no name of a class, function, argument or module: STYLE's table says what is."""


def tracked() -> list[Path]:
    """Return the files of the repository that people read."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [ROOT / name for name in listed if name.endswith(READ) and not name.startswith(NOT_OURS)]


def doubled_classes(files: list[Path]) -> Iterator[str]:
    """Yield each class name of the product that stands in two places."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(PRODUCT) and name.endswith(".py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(f"{name}:{node.lineno}")
    for name, places in sorted(found.items()):
        if len(places) > 1:
            yield f"{places[0]}: class {name} stands at {', '.join(places[1:])} too: give each a name of its own"


def unused_words(files: list[Path]) -> Iterator[str]:
    """Yield each place that uses a word of the list."""
    words = re.compile(r"\b(?:" + "|".join(f"({word})" for word in WORDS) + r")\b", re.IGNORECASE)
    instead = list(WORDS.values())
    groups = [re.compile(rf"(?:{word})", re.IGNORECASE) for word in WORDS]
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in words.finditer(line):
                index = next(index for index, word in enumerate(groups) if word.fullmatch(match[0]))
                yield f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead[index]!r}"


def unused_names(files: list[Path]) -> Iterator[str]:
    """Yield each definition of the product that is called by a word of `NAMES`."""
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(PRODUCT) or not name.endswith(".py"):
            continue
        if path.stem in NAMES:
            yield f"{name}:1: the module's name says nothing of what it holds"
        for node in ast.walk(ast.parse(path.read_text())):
            for defined in _definitions(node):
                if defined.strip("_").lower() in NAMES and (name, defined) not in WIRE_NAMES:
                    yield f"{name}:{getattr(node, 'lineno', 1)}: {defined!r} says nothing of what it stands for"


def _definitions(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def main() -> int:
    """Print what is wrong. Returns the exit status."""
    files = tracked()
    findings = [*doubled_classes(files), *unused_names(files), *unused_words(files)]
    print("\n".join(findings) or "language: nothing to change")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
