"""Scripts against a whole Nexus: services entered with curl alone, everything verified, an old Nexus carried over."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.backends.doubles.service import ServiceDouble
from tests.cluster import KEY, Cluster, chat
from tests.conftest import Eventually
from tests.deploy.scripts import DONE, FAILED, MISSING, USAGE, run, run_beside

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    settings: dict[str, Any] = {"WORKER_LEASE_S": "2", "WORKER_HEALTH_INTERVAL_S": "1"}
    async with Cluster(tmp_path_factory.mktemp("cluster"), **settings) as cluster:
        await cluster.start_gateway()
        await cluster.start_worker("echo")
        await cluster.start_worker("service", name="services")
        yield cluster


# --- register-service.sh, list-services.sh ----------------------------------------------------------------------------------


async def test_a_service_that_is_registered_is_served_moved_and_ended(cluster: Cluster, eventually: Eventually) -> None:
    etcd = cluster.etcd.url
    nobody = "http://127.0.0.1:1"

    async def serves(model: str) -> bool:
        return model in {one["id"] for one in (await cluster.get("/v1/models")).json()["data"]}

    async with ServiceDouble("talker") as first, ServiceDouble("talker") as second:
        said = await run_beside("register-service.sh", "--check", "talker", first.url, f"{nobody},{etcd}")
        assert said.code == DONE, said.all
        await eventually(lambda: serves("talker"))
        assert (await cluster.post("/v1/chat/completions", chat(model="talker"))).status_code == 200
        assert first.seen

        listed = await run_beside("list-services.sh", "--json", "--check", etcd)
        mine = next(one for one in json.loads(listed.out) if one["name"] == "talker")
        assert mine == {
            "name": "talker",
            "base_url": first.url,
            "metadata_url": f"{first.url}/v1/metadata",
            "state": "answers",
        }

        again = await run_beside("register-service.sh", "talker", first.url + "/", etcd)
        assert "already" in again.err
        moved = await run_beside("register-service.sh", "talker", second.url, etcd)
        assert moved.code == DONE
        assert "moved" in moved.err

        async def asked_the_second() -> bool:
            await cluster.post("/v1/chat/completions", chat(model="talker"))
            return bool(second.seen)

        await eventually(asked_the_second)
        removed = await run_beside("register-service.sh", "--remove", "talker", etcd)
        assert removed.code == DONE
        await eventually(lambda: _not(serves("talker")))
    assert "talker" not in (await run_beside("list-services.sh", etcd)).all


async def _not(truth: Any) -> bool:
    return not await truth


async def test_records_are_as_people_name_them_and_under_any_prefix(cluster: Cluster, etcd_prefix: str) -> None:
    etcd = cluster.etcd.url
    words = (
        "--prefix",
        etcd_prefix,
        "--metadata-url",
        "http://é.example:1/about?x=1&y=2",
        "stimme-é",
        "http://é.example:1",
        etcd,
    )
    assert run("register-service.sh", *words).code == DONE
    [one] = json.loads(run("list-services.sh", "--json", etcd, ETCD_PREFIX=etcd_prefix).out)
    assert one == {
        "name": "stimme-é",
        "base_url": "http://é.example:1",
        "metadata_url": "http://é.example:1/about?x=1&y=2",
    }
    assert (
        run("register-service.sh", "--check", "--prefix", etcd_prefix, "x", "http://127.0.0.1:1", etcd).code == FAILED
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("a/b", "http://x:1", "ETCD"), USAGE, "no name"),
        (("a", "ftp://x:1", "ETCD"), USAGE, "http://"),
        (("a", "http://me:secret@x:1", "ETCD"), USAGE, "no user or password"),
        (("a", "http://x:1"), USAGE, "Three words"),
        (("a", "http://x:1", "etcd:2379"), USAGE, "http://10.0.0.5:2379"),
        (("a", "http://x:1", "http://127.0.0.1:1"), FAILED, "No etcd answers"),
        (("--user", "root", "a", "http://x:1", "ETCD"), USAGE, "password"),
        (("--user", "root", "--password-file", "/nowhere", "a", "http://x:1", "ETCD"), MISSING, "/nowhere"),
        (("a", "http://x:1", "ETCD", "--cacert"), USAGE, "--cacert needs a value"),
    ],
)
async def test_what_cannot_be_registered_is_refused_and_said(
    cluster: Cluster, words: tuple[str, ...], code: int, says: str
) -> None:
    said = run("register-service.sh", *(cluster.etcd.url if word == "ETCD" else word for word in words))
    assert said.code == code, said.all
    assert says in said.err
    assert "secret" not in said.out


async def test_an_etcd_with_users_wants_the_password(own_etcd: Any, tmp_path: Path) -> None:
    """As `etcdctl user add root; etcdctl auth enable` would have it."""
    etcd, password = own_etcd.url, 'p"a\\ss é'
    name, role = {"name": "root", "password": password}, {"user": "root", "role": "root"}
    for path, body in (("user/add", name), ("role/add", {"name": "root"}), ("user/grant", role), ("enable", {})):
        assert httpx.post(f"{etcd}/v3/auth/{path}", json=body).status_code == 200
    words = ("talker", "http://x:1", etcd)
    assert run("register-service.sh", *words).code == FAILED
    wrong = run("register-service.sh", "--user", "root", *words, ETCD_PASSWORD="wrong")
    assert wrong.code == FAILED
    assert "authentication failed" in wrong.err
    assert "wrong" not in wrong.all.replace("wrong password", "")
    assert run("register-service.sh", "--user", "root", *words, ETCD_PASSWORD=password).code == DONE
    (tmp_path / "password").write_text(password + "\n")
    listed = run("list-services.sh", "--json", etcd, ETCD_USER="root", ETCD_PASSWORD_FILE=str(tmp_path / "password"))
    assert [one["name"] for one in json.loads(listed.out)] == ["talker"]


# --- verify-gateway.sh ------------------------------------------------------------------------------------------------------

EVERYTHING = {
    *(
        "health",
        "readyz",
        "wrong-key",
        "models",
        "unknown-model",
        "chat",
        "chat-stream",
        "completions",
        "embeddings",
        "images",
    ),
    *("speech", "transcription", "rerank", "responses", "job", "job-result", "job-events", "file", "batch"),
}


async def verify(*words: str, **settings: str) -> tuple[int, dict[str, dict[str, Any]]]:
    said = await run_beside("verify-gateway.sh", "--json", *words, **settings)
    assert KEY not in said.all
    told = json.loads(said.out)
    assert told["ok"] == (said.code == DONE)
    return said.code, {check["name"]: check for check in told["checks"]}


async def test_a_whole_nexus_passes_every_check_and_keeps_nothing(cluster: Cluster) -> None:
    code, checks = await verify(cluster.url, NEXUS_API_KEY=KEY)
    assert code == DONE, checks
    assert {name for name, check in checks.items() if check["status"] == "pass"} == EVERYTHING
    assert checks["chat"]["model"] == "echo"
    assert (await cluster.get("/v1/files")).json()["data"] == []


async def test_the_table_names_each_check_and_the_key_can_come_from_a_file(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    skip = [word for name in EVERYTHING - {"health", "chat"} for word in ("--skip", name)]
    said = await run_beside("verify-gateway.sh", *skip, "--key-file", str(tmp_path / "key"), cluster.url + "/v1")
    assert said.code == DONE, said.all
    assert said.out.splitlines()[0].split() == ["check", "seconds", "model", "detail"]
    assert {line.split()[1] for line in said.out.splitlines() if line.startswith("pass ")} == {
        "health",
        "models",
        "chat",
    }


async def test_what_has_no_model_is_skipped_unless_it_is_required(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await cluster.start_gateway()
        code, checks = await verify(cluster.url, NEXUS_API_KEY=KEY)
        assert code == DONE, checks
        assert {name for name, check in checks.items() if check["status"] == "pass"} == {
            "health",
            "readyz",
            "wrong-key",
            "file",
        }
        assert "no model" in checks["chat"]["detail"]
        code, checks = await verify("--require", "chat", cluster.url, NEXUS_API_KEY=KEY)
        assert code == FAILED
        assert checks["chat"]["status"] == "fail"
        # Without etcd or Redis requests still work, and yet all is not well.
        await cluster.redis.stop()
        code, checks = await verify(cluster.url, NEXUS_API_KEY=KEY)
        assert code == FAILED
        assert checks["readyz"]["status"] == "fail"
        assert "redis" in checks["readyz"]["detail"]


async def test_a_key_that_may_less_is_told_from_a_fault(cluster: Cluster) -> None:
    made = (await cluster.post("/v1/keys", {"name": "inference-only", "scopes": ["inference"]})).json()
    code, checks = await verify(cluster.url, NEXUS_API_KEY=made["key"])
    assert code == DONE, checks
    assert checks["chat"]["status"] == "pass"
    assert {checks[name]["status"] for name in ("job", "file")} == {"skip"}
    code, checks = await verify(cluster.url, NEXUS_API_KEY="nexus-of-nobody")
    assert code == FAILED
    assert checks["models"]["status"] == "fail"
    assert "chat" not in checks


@dataclass(frozen=True)
class Fault:
    """The answer of the routes that begin with `path`, and the checks that find it."""

    path: str
    status: int
    body: str
    found: set[str]


class Meddler(ThreadingHTTPServer):
    """Stands before a gateway, and answers some routes in its own way: what a broken gateway would do."""

    daemon_threads = True

    def __init__(self, gateway: str, faults: Sequence[Fault]) -> None:
        super().__init__(("127.0.0.1", 0), Meddling)
        self.gateway, self.faults = gateway, faults
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Meddling(BaseHTTPRequestHandler):
    server: Meddler

    def log_request(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("content-length") or 0))
        for fault in self.server.faults:
            if self.path.split("?")[0].startswith(fault.path) and self.path != fault.path + "/none":
                self._answer(fault.status, "application/json", fault.body.encode())
                return
        headers = {
            name: value for name, value in self.headers.items() if name.lower() in {"authorization", "content-type"}
        }
        answer = httpx.request(self.command, self.server.gateway + self.path, content=sent, headers=headers, timeout=60)
        self._answer(answer.status_code, answer.headers.get("content-type", "text/plain"), answer.content)

    do_POST = do_DELETE = do_GET  # noqa: N815 -- so http.server calls them

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def meddled(cluster: Cluster, faults: Sequence[Fault]) -> Iterator[str]:
    server = Meddler(cluster.url, faults)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CHUNK = 'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n'
CHAT = {"chat", "chat-stream", "unknown-model"}
BROKEN = {
    "one of each kind": [
        Fault("/health", 503, "{}", {"health"}),
        Fault("/v1/completions", 502, '{"error": {"message": "away"}}', {"completions"}),
        Fault("/v1/embeddings", 200, '{"data": [{"embedding": []}]}', {"embeddings"}),
        Fault("/v1/images/generations", 200, '{"data": [{"b64_json": "aGVsbG8="}]}', {"images"}),
        Fault("/v1/audio/transcriptions", 200, '{"text": ""}', {"transcription"}),
        Fault("/v1/rerank", 200, '{"results": []}', {"rerank"}),
        Fault("/v1/responses", 200, '{"status": "failed"}', {"responses"}),
        Fault("/v1/jobs", 503, '{"error": {"message": "Redis is away"}}', {"job"}),
    ],
    "open to anyone": [Fault("/v1/models", 200, '{"object": "list", "data": []}', {"wrong-key"})],
    "no answer in it": [Fault("/v1/chat/completions", 200, "{}", CHAT)],
    "a stream that only ends": [Fault("/v1/chat/completions", 200, CHUNK, CHAT)],
    "a stream that fails": [
        Fault("/v1/chat/completions", 200, CHUNK + 'data: {"error": {"message": "worker lost"}}\n\n', CHAT)
    ],
    "other bytes": [
        Fault("/v1/files", 200, '{"id": "file-1"}', {"file", "batch"}),
        Fault("/v1/audio/speech", 200, "hello", {"speech"}),  # what is transcribed is what was spoken
    ],
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_each_fault_is_found_and_nothing_else_is_blamed(cluster: Cluster, broken: str) -> None:
    faults = BROKEN[broken]
    names = set[str]().union(*(fault.found for fault in faults))
    slow = () if "file" in names else ("--skip", "batch")
    with meddled(cluster, faults) as url:
        code, checks = await verify(*slow, "--timeout", "20", url, NEXUS_API_KEY=KEY)
    assert code == FAILED
    assert {name for name, check in checks.items() if check["status"] == "fail"} == names, checks
    assert all(checks[name]["detail"] for name in names)


async def test_where_nothing_answers_it_ends_at_once() -> None:
    code, checks = await verify("http://127.0.0.1:1", NEXUS_API_KEY=KEY)
    assert code == FAILED
    assert set(checks) == {"health", "readyz"}


# --- migrate-from-nexus-http.sh -----------------------------------------------------------------------------------------------

SECRET = "old-secret-of-the-team-0123456789"
OLD_ENV = f"""\
# Nexus Configuration
GATEWAY_BEARER_TOKEN={SECRET}
GATEWAY_PORT=8900
OBSERVABILITY_PORT=8801
GATEWAY_HOST=0.0.0.0
MAX_REQUEST_BYTES=104857600
GATEWAY_BEARER_TOKENS=tok-of-ann,tok-of-ben
IP_ALLOWLIST=10.0.0.0/8
PUBLIC_BASE_URL=https://ai.example
LOG_LEVEL=INFO
ENABLE_OLLAMA=true
ENABLE_GPU=true
DEFAULT_BACKEND=ollama
OLLAMA_BASE_URL=http://ollama:11434
VLLM_FAST_BASE_URL=http://stackrot:8001/v1
VLLM_FAST_ADVERTISE_BASE_URL=http://stackrot.lan:8001/v1
POCKET_TTS_BASE_URL=http://tts:9940
LUXTTS_BASE_URL=http://ada2:9170
HEARTMULA_BASE_URL=http://heartmula:9185
EMBEDDINGS_MODEL=BAAI/bge-small-en-v1.5
IMAGES_HTTP_TIMEOUT_SEC=1200
ETCD_ENABLED=true
ETCD_URL=http://etcd:2379
ETCD_PREFIX=/nexus/services/
ETCD_POLL_INTERVAL=15
TOOLS_ALLOW_SHELL=false
TELEGRAM_TOKEN=123:telegram-secret
"""
OLD_ALIASES = {
    "aliases": {
        "Default": {"backend": "local_vllm", "model": "vllm:Qwen/Qwen2.5-7B", "tools": True, "max_tokens_cap": 2048},
        "fast": "ollama:qwen3:1.7b",
        "glm-5.2": {"backend": "local_mlx", "upstream_model": "mlx-community/GLM-5.2-4bit", "context_window": 65536},
        "nonsense": "no backend",
    }
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The old Nexus's checkout, as its README says where things are."""
    folder = tmp_path / "old"
    config = folder / ".runtime" / "gateway" / "config"
    config.mkdir(parents=True)
    (folder / ".env").write_text(OLD_ENV)
    (config / "model_aliases.json").write_text(json.dumps(OLD_ALIASES, indent=2))
    return folder


def settings_of(env: Path) -> dict[str, str]:
    lines = (line for line in env.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


async def test_settings_carry_over_and_the_rest_is_named(old: Path, tmp_path: Path) -> None:
    env = tmp_path / "new.env"
    words = ("--env", str(env), str(old))
    plan = run("migrate-from-nexus-http.sh", *words)
    assert plan.code == DONE, plan.all
    assert not env.exists(), "without --apply nothing is changed"

    said = run("migrate-from-nexus-http.sh", "--apply", *words)
    assert said.code == DONE, said.all
    assert settings_of(env) == {
        "GATEWAY_BEARER_TOKEN": SECRET,
        "GATEWAY_PORT": "8900",
        "OBSERVABILITY_PORT": "8801",
        "GATEWAY_HOST": "0.0.0.0",
        "MAX_BODY_BYTES": "104857600",
        "PUBLIC_URL": "https://ai.example",
        "LOG_LEVEL": "info",
        "MEDIA_TIMEOUT_S": "1200",
        "TOTAL_TIMEOUT_S": "1200",
        "COMPOSE_PROFILES": "ollama",
        "WORKER_BACKEND": "openai",
        "WORKER_BACKEND_URL": "http://stackrot.lan:8001/v1",
    }
    assert env.stat().st_mode & 0o777 == 0o600
    for secret in (SECRET, "tok-of-ann", "telegram-secret"):
        assert secret not in plan.all + said.all
    # Every setting of the old file is accounted for.
    for name in settings_of(old / ".env"):
        stem = name.removesuffix("_BASE_URL").removesuffix("_ADVERTISE").lower().replace("_", "-")
        assert name in said.out or stem in said.out or name in {"DEFAULT_BACKEND", "EMBEDDINGS_MODEL"}, name
    left = said.lines("left")
    assert any(line.startswith("GATEWAY_BEARER_TOKENS: 2 keys") for line in left)
    assert any("heartmula" in line for line in left)
    assert any("pocket-tts" in line and "only the old containers reach it" in line for line in left)
    assert "nexus worker --backend openai --url http://stackrot.lan:8001/v1" in said.lines("worker")[0]

    before = env.read_text()
    assert run("migrate-from-nexus-http.sh", "--apply", *words).code == DONE
    assert env.read_text() == before
    assert len(list(tmp_path.glob("new.env*"))) == 1, "nothing new: nothing is kept beside"


async def test_an_env_that_is_there_is_kept_and_its_own_values_stay(old: Path, tmp_path: Path) -> None:
    env = tmp_path / "new.env"
    env.write_text("GATEWAY_PORT=7000\nLOG_FORMAT=console\n")
    said = run("migrate-from-nexus-http.sh", "--apply", "--env", str(env), str(old))
    assert said.code == DONE
    assert settings_of(env)["GATEWAY_PORT"] == "7000"
    assert settings_of(env)["LOG_FORMAT"] == "console"
    assert settings_of(env)["MAX_BODY_BYTES"] == "104857600"
    [kept] = tmp_path.glob("new.env.before-migration-*")
    assert kept.read_text() == "GATEWAY_PORT=7000\nLOG_FORMAT=console\n"
    run("migrate-from-nexus-http.sh", "--apply", "--force", "--env", str(env), str(old))
    assert settings_of(env)["GATEWAY_PORT"] == "8900"


async def test_an_example_key_and_a_missing_folder_are_not_carried_over(old: Path, tmp_path: Path) -> None:
    (old / ".env").write_text("GATEWAY_BEARER_TOKEN=change-me-in-production\nGATEWAY_PORT=8900\n")
    said = run("migrate-from-nexus-http.sh", "--apply", "--env", str(tmp_path / "new.env"), str(old))
    assert said.code == DONE
    assert "GATEWAY_BEARER_TOKEN" not in settings_of(tmp_path / "new.env")
    missing = run("migrate-from-nexus-http.sh", str(tmp_path / "nowhere"))
    assert missing.code == MISSING
    assert ".env is not there" in missing.err


@pytest.mark.parametrize("way", ["gateway", "etcd"])
async def test_aliases_and_services_carry_over_into_a_running_nexus(
    cluster: Cluster, own_etcd: Any, old: Path, tmp_path: Path, way: str, eventually: Eventually
) -> None:
    record = {
        "name": "voice",
        "base_url": "http://ada2:9940",
        "metadata_url": "http://ada2:9940/v1/metadata",
        "backend_class": "pocket_tts",
    }
    ollama = {"name": "ollama-ai1", "base_url": "http://ai1:11434", "backend_class": "ollama", "hostname": "ai1"}

    def coded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    lease = httpx.post(f"{own_etcd.url}/v3/lease/grant", json={"TTL": 90}).json()["ID"]
    for one in (record, ollama):
        put = {"key": coded(f"/nexus/services/{one['name']}"), "value": coded(json.dumps(one)), "lease": lease}
        assert httpx.post(f"{own_etcd.url}/v3/kv/put", json=put).status_code == 200

    to = ("--gateway", cluster.url) if way == "gateway" else ("--etcd", cluster.etcd.url)
    words = ("--apply", "--env", str(tmp_path / "new.env"), *to, "--old-etcd", own_etcd.url, str(old))
    said = await run_beside("migrate-from-nexus-http.sh", *words, NEXUS_API_KEY=KEY)
    assert said.code == DONE, said.all
    assert KEY not in said.all
    wanted = {
        "default": ["Qwen/Qwen2.5-7B"],
        "default-chat": ["Qwen/Qwen2.5-7B"],
        "default-embeddings": ["BAAI/bge-small-en-v1.5"],
        "fast": ["qwen3:1.7b"],
        "glm-5.2": ["mlx-community/GLM-5.2-4bit"],
    }

    async def aliases() -> dict[str, list[str]]:
        return {one["id"]: one["targets"] for one in (await cluster.get("/v1/aliases")).json()["data"]}

    async def services() -> dict[str, str]:
        return {one["id"]: one["base_url"] for one in (await cluster.get("/v1/services")).json()["data"]}

    await eventually(lambda: _is(aliases(), wanted))
    await eventually(lambda: _is(services(), {"voice": "http://ada2:9940", "luxtts": "http://ada2:9170"}))
    assert any("max_tokens_cap=2048" in line for line in said.lines("left"))
    assert any("nonsense" in line for line in said.lines("left"))
    assert any("voice" in line and "registrar" in line for line in said.lines("note"))
    assert any("nexus worker --backend ollama --url http://ai1:11434" in line for line in said.lines("worker"))

    # Again: all is there; and what an operator has changed since stays.
    await cluster.http.put(f"{cluster.url}/v1/aliases/fast", json={"targets": ["newer"]})
    await eventually(lambda: _is(aliases(), wanted | {"fast": ["newer"]}))
    again = await run_beside("migrate-from-nexus-http.sh", *words, NEXUS_API_KEY=KEY)
    assert again.code == DONE
    assert not [line for line in again.lines("carried") if line.startswith(("alias", "service"))], again.out
    assert any(line.startswith("alias fast") for line in again.lines("left"))
    for kind, found in (("aliases", await aliases()), ("services", await services())):
        for name in found:
            assert (await cluster.http.delete(f"{cluster.url}/v1/{kind}/{name}")).status_code == 200


async def _is(found: Any, wanted: Any) -> bool:
    return bool(await found == wanted)


async def test_a_gateway_that_refuses_is_reported_and_fails(cluster: Cluster, old: Path, tmp_path: Path) -> None:
    words = ("--apply", "--env", str(tmp_path / "new.env"), "--gateway", cluster.url, str(old))
    said = await run_beside("migrate-from-nexus-http.sh", *words, NEXUS_API_KEY="nexus-of-nobody")
    assert said.code == FAILED
    assert "401" in said.err
