"""What the documents say is so: metrics, settings, commands, routes, links, dependencies."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from prometheus_client import CollectorRegistry

from backbone.settings import GatewaySettings, WorkerSettings
from cli.app import app
from docs.generator.log_events import events
from gateway.app import DIALECT_PATHS, ROUTERS
from gateway.jobs.http_handler import PATH as SUBMIT
from gateway.metrics import GatewayMetrics
from gateway.routes import operations, overview
from schemas.endpoints import ENDPOINTS
from tests.conftest import ATTACKS
from workers.metrics import WorkerMetrics

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md", ROOT / "deploy" / "README.md"]
)
REFERENCE = ROOT / "docs" / "reference"

CODE = re.compile(r"`([^`\n]+)`|```.*?\n(.*?)```", re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
METRIC = re.compile(r"\bnexus_(?!teller\b|inference_gateway\b)[a-z_]+\b")  # an adapter of an example, and our wheel
SUFFIXES = ("_bucket", "_sum", "_count")
SETTING = re.compile(r"\b(?:[A-Z]+_)+[A-Z]+\b")
NOT_SETTINGS = re.compile(
    r"NEXUS_\w+|BASE_URL|ETCD_UNSAFE_NO_FSYNC|MAX_STARTS|BODY_LIMIT|TESTCONTAINERS_RYUK_DISABLED|OLLAMA_\w+|OPENAI_\w+|ANTHROPIC_\w+|VLLM_\w+|GITHUB_TOKEN|NET_BIND_SERVICE|OTEL_\w+"
)
"""Variables of the console and the embedded stack, of tools, streams, and constants that a page names."""
COMPOSE = set(re.findall(r"^#([A-Z_0-9]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
"""tests/unit/backbone/test_settings.py and tests/deploy/test_compose.py hold these against the processes and the compose files."""
OLD = set(SETTING.findall((ROOT / "deploy" / "scripts" / "migrate-from-nexus-http.sh").read_text()))
COMMAND = re.compile(r"(?:^|[`$ ])nexus ([a-z]+)\b", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
ROUTE = re.compile(r"`(GET|POST|PUT|PATCH|DELETE) (/[^`\s]*)`")


def metrics(registry: CollectorRegistry) -> set[str]:
    """Names as Prometheus sees them."""
    collectors = cast("dict[Any, list[str]]", registry._collector_to_names)
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for collector in collectors
        for family in collector.collect()
    }


@cache
def known_metrics() -> set[str]:
    """Of both processes, also as Prometheus names the parts of a histogram."""
    known = metrics(GatewayMetrics().registry) | metrics(WorkerMetrics().registry)
    return known | {name + suffix for name in known for suffix in SUFFIXES}


@cache
def settings() -> set[str]:
    """The processes', those of the compose files alone, and the old Nexus's, which are carried over."""
    ours = {name.upper() for kind in (GatewaySettings, WorkerSettings) for name in kind.model_fields}
    return ours | COMPOSE | OLD


@cache
def commands() -> dict[str, set[str]]:
    """Each command and its flags, those of its own commands among them."""
    root = cast("Any", typer.main.get_command(app))
    return {
        name: set().union(*map(flags, (command, *getattr(command, "commands", {}).values())))
        for name, command in root.commands.items()
    }


def flags(command: Any) -> set[str]:
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("--")}


def code_of(page: str) -> str:
    return "\n".join(short or long for short, long in CODE.findall(page))


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("title", "registry"), [("Gateway", GatewayMetrics().registry), ("Worker", WorkerMetrics().registry)]
)
def test_every_metric_is_described_and_every_described_one_exists(title: str, registry: CollectorRegistry) -> None:
    """The tables in docs/reference/metrics.md and the code name the same metrics."""
    page = (REFERENCE / "metrics.md").read_text()
    assert set(METRIC.findall(section(page, title))) == metrics(registry)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_metric_that_is_not_there(page: Path) -> None:
    """Alarms on metrics that do not exist never ring."""
    assert set(METRIC.findall(page.read_text())) <= known_metrics()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    """A setting that is misspelt in a page would be ignored without a word."""
    named = set(SETTING.findall(code_of(page.read_text())))
    assert {name for name in named - settings() if not NOT_SETTINGS.fullmatch(name)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    """Commands that are pasted from a page work."""
    assert set(COMMAND.findall(code_of(page.read_text()))) <= set(commands())


def test_every_flag_that_a_page_names_exists() -> None:
    """On every line with a `nexus` command, its flags are that command's."""
    known, seen = commands(), 0
    text = "\n".join(code_of(page.read_text()) for page in PAGES if "adr" not in page.parts)
    for line in text.replace('make up ARGS="', "nexus up ").splitlines():
        for command in COMMAND.findall(line.split("#")[0])[:1]:
            named = set(FLAG.findall(line.split("#")[0]))
            seen += len(named)
            assert named <= known[command] | {"--help"}, line
    assert seen > 10


def test_every_log_event_that_operations_explains_exists() -> None:
    """An operator who searches the logs for it finds it."""
    lines = section((ROOT / "docs" / "how-to" / "operations.md").read_text(), "Logs").splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    explained = {key for row in rows for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", row)}
    assert len(explained) > 20
    assert explained <= set(events())


def test_every_command_is_in_the_reference() -> None:
    """Nobody has to guess what the console can do."""
    assert set(commands()) <= set(COMMAND.findall(code_of((REFERENCE / "cli.md").read_text())))


def test_the_reference_lists_every_route() -> None:
    """The routes in docs/reference/routes.md are the ones that are served."""
    served = {("POST", endpoint.path) for endpoint in ENDPOINTS} | {("POST", SUBMIT), ("GET", f"{SUBMIT}/{{id}}")}
    served |= {("POST", path) for path in DIALECT_PATHS}
    for router in (*ROUTERS, operations.public_readiness, operations.metrics_router, overview.status_router):
        for route in cast("list[Any]", router.routes):
            path = re.sub(r"\{[^}]+\}", "{id}", route.path)
            served |= {(method, path) for method in route.methods if method != "HEAD"}
    page = re.sub(r"\{[^}]+\}", "{id}", (REFERENCE / "routes.md").read_text())
    assert set(ROUTE.findall(page)) == served


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Links to files and headings of this repository resolve."""
    for link in LINK.findall(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text()), link


def anchors(page: str) -> set[str]:
    """Headings as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_dependency_has_an_owner_among_the_import_contracts() -> None:
    """A library that anybody may import ends up everywhere; pydantic alone may. nkeys is nats-py's to import, psycopg SQLAlchemy's, and nobody's here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = {re.split(r"[^\w.-]", line)[0].replace("_", "-").lower() for line in project["project"]["dependencies"]}
    modules: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for name in distributions:
            modules.setdefault(name.replace("_", "-").lower(), set()).add(module)
    contracts = project["tool"]["importlinter"]["contracts"]
    owned = {module for one in contracts for module in one.get("protected_modules", [])}
    assert {name for name in wanted if not modules[name] & owned} == {"pydantic", "nkeys", "psycopg"}


def test_each_file_of_attacks_exists() -> None:
    """A file that was moved would leave `make attack` without a word."""
    assert [path for path in ATTACKS if not (ROOT / path).is_file()] == []
