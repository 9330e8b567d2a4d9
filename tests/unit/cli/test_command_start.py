"""A command imports only the modules that it needs: `nexus --version` takes 0.05 s of CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from cli.app import COMMANDS
from tests.unit.cli.gateway_double import serve

ROOT = Path(__file__).parents[3]
HEAVY = {
    *("pydantic", "pydantic_settings", "fastapi", "starlette", "uvicorn", "httpx", "asyncio", "nats", "redis", "grpc"),
    *(
        "etcd3aio",
        "structlog",
        "prometheus_client",
        "cryptography",
        "orjson",
        "numpy",
        "av",
        "PIL",
        "gateway",
        "workers",
    ),
}
PARSER = {"typer"}
TABLES = {"rich"}
PROCESSES = {"up", "gateway", "worker", "backup", "restore", "permissions"}
"""These start or connect to servers: they may import what they like once they run, but not for their help."""
LISTING = {
    "object": "list",
    "data": [],
    "has_more": False,
    "last_id": None,
    "next_after": None,
    "status": "ok",
    "parts": {},
    "url": "http://gw",
}
JOB = {"id": "job_1", "object": "job", "status": "completed", "created_at": 1, "endpoint": "/v1/chat/completions"}
KEY = {"id": "key_1", "name": "a", "owner": "a", "scopes": ["jobs"], "key": "nexus-x", "webhook_secret": "whsec_x"}
CHAT = {"choices": [{"message": {"role": "assistant", "content": "Hi."}}]}
RUN = """
import sys
from cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code
else:
    code = 0
print("\\nmodules:", code or 0, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    """The top-level modules that a command has imported when it ends well."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NEXUS_API_KEY": "sk", "NEXUS_DATA_DIR": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    code, *modules = run.stderr.rpartition("modules:")[2].split()
    assert code == "0", run.stderr
    return set(modules)


def answer(request: httpx.Request) -> httpx.Response:
    path = request.url.path
    if path.endswith("/chat/completions"):
        return httpx.Response(200, json=CHAT)
    if path.endswith("/result"):
        return httpx.Response(200, json=CHAT)
    if path.endswith("/events"):
        return httpx.Response(200, text=f"event: job.completed\nid: 1\ndata: {json.dumps(JOB)}\n\n")
    if "/jobs/" in path or (path.endswith("/jobs") and request.method == "POST"):
        return httpx.Response(200, json=JOB)
    if request.method == "POST" and path.endswith("/keys"):
        return httpx.Response(201, json=KEY)
    return httpx.Response(
        200, json={**LISTING, "id": "x", "targets": ["a"], "resolves_to": "a", "base_url": "http://s"}
    )


def test_the_version_needs_no_parser() -> None:
    """Nor anything that it would import."""
    assert imported("--version") & (HEAVY | PARSER | TABLES) == set()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("jobs", "list"), ("keys", "create")])
def test_help_needs_the_parser_alone(command: tuple[str, ...]) -> None:
    """Of every command, whatever it does when it runs."""
    allowed = {"asyncio"} if PROCESSES & {*command} else set()
    assert imported(*command, "--help") & (HEAVY | TABLES) - allowed == set()


@pytest.mark.parametrize(
    "command",
    [
        *(
            "status",
            "workers",
            "queues",
            "models",
            "pull m --detach",
            "drain x",
            "jobs list",
            "jobs show job_1",
            "jobs cancel job_1",
            "dlq list",
        ),
        *("jobs retry job_1", "dlq show job_1", "aliases", "aliases set x a", "services", "services add x http://s"),
        *("keys list", "keys create a", "keys revoke key_1", "watch job_1", "submit chat - --model m"),
    ],
)
def test_a_command_that_asks_a_gateway_imports_no_servers(command: str, tmp_path: Path) -> None:
    """It imports a way to print a table, at most."""
    if command.startswith("submit"):
        (tmp_path / "body.json").write_text("{}")
        command = command.replace("-", str(tmp_path / "body.json"), 1)
    assert imported(*command.split(), "--url", serve(answer)) & HEAVY == set()


@pytest.mark.parametrize(
    "command", ["chat m --no-stream -m hi", "jobs list --json", "keys create a", "aliases remove x", "workers --json"]
)
def test_commands_without_tables_do_not_import_rich(command: str) -> None:
    """Scripts call these in loops."""
    assert imported(*command.split(), "--url", serve(answer)) & (HEAVY | TABLES) == set()
