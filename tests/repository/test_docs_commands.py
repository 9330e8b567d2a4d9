"""Commands in the documents, as a reader would paste them: parsed by the parser that would run them."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from typer.core import TyperGroup

from cli.app import app
from gateway.app import DIALECT_PATHS, ROUTERS
from gateway.jobs.http_handler import PATH as SUBMIT
from gateway.routes import operations
from schemas.endpoints import ENDPOINTS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"),
        *(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "adr"),
        *(ROOT / "deploy").rglob("*.md"),
        *(ROOT / "bench").glob("*.md"),
        *(page for page in (ROOT / "tests").rglob("*.md") if "node_modules" not in page.parts),
    ]
)
"""Decisions and the changelog tell of the past."""
BLOCK = re.compile(r"^ *```(?:bash|sh|console)?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)``?([^`\n]+)``?(?!`)")
PUNCTUATION = frozenset("();<>|&")
ROUTE = re.compile(r"\b(GET|POST|PUT|DELETE) (/(?:v1|health|readyz|metrics|docs|openapi)[^\s`'\",;)]*)")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FILE = re.compile(
    r"(?<![\w./-])((?:deploy|docs|tests|bench|cli|gateway|workers|schemas|backbone)/[\w./-]+\.(?:sh|py|yml|yaml|md|conf|json))\b"
)

EXAMPLES = {"workers/backends/teller.py", "tests/backends/test_teller.py"}
"""Files that docs/how-to/adapters.md has its reader make."""
OF_SERVICES = {"GET /v1/metadata", "GET /v1/descriptor"}
"""Routes of services that describe themselves: docs/reference/service-api.md."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def words_of(line: str) -> list[str]:
    """As a shell takes a line apart, but for expansions."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return []


@functools.cache
def lines(page: str) -> list[tuple[list[str], bool]]:
    """The words of each line of code, and whether it can be pasted as it stands."""
    blocks = [line for block in BLOCK.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    found = [(words_of(line), True) for line in blocks]
    return found + [(words_of(line), False) for line in INLINE.findall(BLOCK.sub("", page))]


def commands(page: str, program: str) -> Iterator[tuple[list[str], bool]]:
    """The arguments of each call of `program`."""
    for words, whole in lines(page):
        for arguments in calls(words, program):
            yield arguments, whole


def calls(words: list[str], program: str) -> Iterator[list[str]]:
    for at, word in enumerate(words):
        before = words[at - 1] if at else "$"
        begins = before in ("$", "gateway", "exec", "sudo") or set(before) <= PUNCTUATION or re.match(r"\w+=", before)
        if begins and (word == program or word.endswith(f"bin/{program}")):
            yield list(arguments(words[at + 1 :]))


def arguments(words: list[str]) -> Iterator[str]:
    """Up to the end of this command; what stands in brackets may be left out, `…` stands for more."""
    for at, word in enumerate(words):
        if set(word) <= PUNCTUATION:
            return
        redirected = word.isdigit() and words[at + 1 : at + 2] == [">"]
        more = word == "…" and not words[at - 1].startswith("-")
        if not more and not redirected:
            yield word.strip("[]")


def parse(arguments: list[str], *, whole: bool) -> None:
    """Raise what the console would say of these arguments. Not `whole`: what is missing is not the question."""
    command: Any = typer.main.get_command(app)
    name: str | None = "nexus"
    context: Any = None
    while True:
        try:
            context = command.make_context(name, list(arguments), parent=context)
        except Exception as error:
            if type(error).__name__ in ("NoArgsIsHelpError", "Exit") or (
                not whole and type(error).__name__ in ("MissingParameter", "BadParameter")
            ):
                return
            raise
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not isinstance(command, TyperGroup) or not rest:
            return
        name, command, arguments = command.resolve_command(context, rest)


@by_page
def test_every_command_parses(page: Path) -> None:
    """With its options, and, where it can be pasted, with all that it needs."""
    wrong = []
    for arguments, whole in commands(page.read_text(), "nexus"):
        try:
            parse(arguments, whole=whole)
        except Exception as error:
            wrong.append(f"nexus {shlex.join(arguments)}: {getattr(error, 'message', '') or error!r}")
    assert wrong == []


def test_a_wrong_command_would_be_found() -> None:
    """In a block, behind a prompt, in a substitution, in a container, and between other words."""
    page = "```bash\n$ JOB=$(nexus submitt chat)\n. x.env && .venv/bin/nexus worker --urll x  # y\n```\n and `docker compose exec gateway nexus statuss`"
    assert [arguments for arguments, _ in commands(page, "nexus")] == [
        ["submitt", "chat"],
        ["worker", "--urll", "x"],
        ["statuss"],
    ]
    for arguments, whole in commands(page, "nexus"):
        with pytest.raises(Exception, match=r"No such (command|option)"):
            parse(arguments, whole=whole)
    with pytest.raises(Exception, match=r"Missing argument|parameter"):
        parse(["drain"], whole=True)
    assert sum(1 for one in PAGES for _ in commands(one.read_text(), "nexus")) > 50


@by_page
def test_every_make_target_exists(page: Path) -> None:
    """`make` says no more than that there is no rule."""
    named = {
        word for words, _ in commands(page.read_text(), "make") for word in words if re.fullmatch(r"[a-z][\w-]*", word)
    }
    assert named <= TARGETS


@by_page
def test_every_flag_for_make_up_exists(page: Path) -> None:
    """Those in ARGS go to `nexus up`."""
    for words, _ in commands(page.read_text(), "make"):
        flags = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
        if words[:1] == ["up"]:
            parse(["up", *shlex.split(flags)], whole=True)


@by_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Paths within this repository."""
    code = [*BLOCK.findall(page.read_text()), *INLINE.findall(page.read_text())]
    named = {name for one in code for name in FILE.findall(one)}
    assert {name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()} <= EXAMPLES


def served() -> list[re.Pattern[str]]:
    """A pattern for each route; anything may stand in the place of an id."""
    routes = {("POST", endpoint.path) for endpoint in ENDPOINTS} | {("POST", SUBMIT), ("GET", f"{SUBMIT}/{{id}}")}
    for router in (*ROUTERS, operations.public_readiness, operations.metrics_router):
        routes |= {(method, route.path) for route in cast("list[Any]", router.routes) for method in route.methods}
    routes |= {("POST", path) for path in DIALECT_PATHS}
    routes |= {("GET", "/docs"), ("GET", "/openapi.json")}
    return [
        re.compile(f"{method} " + re.sub(r"\\\{[^/]*\\\}", r"[^/]+", re.escape(path)))
        for method, path in sorted(routes)
    ]


@by_page
def test_every_route_exists(page: Path) -> None:
    """With its method; a query, and ids of all kinds, do not matter."""
    known, wrong = served(), set()
    for method, path in ROUTE.findall(page.read_text()):
        route = f"{method} {path.partition('?')[0].rstrip('.:')}"
        if not route.endswith("…") and not any(one.fullmatch(route) for one in known):
            wrong.add(route)
    assert wrong <= OF_SERVICES


@by_page
def test_every_option_of_a_script_exists(page: Path) -> None:
    """Those of deploy/scripts and quickstart.sh, by the text that `--help` prints."""
    text, wrong = page.read_text(), []
    for script in [*(ROOT / "deploy" / "scripts").glob("*.sh"), ROOT / "quickstart.sh"]:
        known = set(re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", script.read_text()))
        for prefix in ("deploy/scripts/", "./", "./deploy/scripts/", "../../deploy/scripts/", ""):
            for words, _ in commands(text, prefix + script.name):
                own = itertools.takewhile(lambda one: one != "--", words)
                wrong += [f"{script.name} {one}" for one in own if one.startswith("-") and one not in known]
    assert wrong == []


@by_page
def test_every_compose_file_and_profile_exists(page: Path) -> None:
    """Layers, by `-f`, and what brings a server along, by `--profile`."""
    profiles = set(
        re.findall(r"profiles: \[([\w, -]+)\]", "\n".join(one.read_text() for one in ROOT.glob("docker-compose*.yml")))
    )
    known = {name.strip() for one in profiles for name in one.split(",")}
    for words, _ in commands(page.read_text(), "docker"):
        for option, value in itertools.pairwise(words):
            if words[0] == "compose" and option == "-f":
                assert (ROOT / value).exists(), words
            if words[0] == "compose" and option == "--profile":
                assert value in known, words
