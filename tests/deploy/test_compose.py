"""What the compose files promise, read from the files themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from backbone.settings import GatewaySettings, WorkerSettings
from tests.deploy.composed import Json, stack, top, variables
from tests.servers import ROOT
from tests.unit.backbone.test_settings import COMPOSE, EXAMPLE, SETTING, defaults
from workers.backends.base import load_adapters

BASE, WORKERS, COMMON = "docker-compose.yml", "docker-compose.worker.yml", "deploy/compose/common.yml"
STACKS = {
    "base": (BASE,),
    "gpu": (BASE, "docker-compose.gpu.yml"),
    "scale": (BASE, "docker-compose.scale.yml"),
    "tls": (BASE, "docker-compose.scale.yml", "docker-compose.tls.yml"),
    "prod": (BASE, "docker-compose.prod.yml"),
    "ledger": (BASE, "docker-compose.scale.yml", "docker-compose.ledger.yml"),
    "secrets": (BASE, "docker-compose.oidc.yml", "docker-compose.team-keys.yml"),
    "pinned": (BASE, "docker-compose.pinned.yml"),
    "dev": (BASE, "docker-compose.dev.yml"),
    "cluster": (BASE, "deploy/cluster/docker-compose.yml"),
    "workers": (WORKERS,),
    "workers with GPUs": (WORKERS, "docker-compose.gpu.yml"),
}
STACKS = {name: files for name, files in STACKS.items() if all((ROOT / file).exists() for file in files)}
PROFILES = ("ollama", "invokeai", "comfyui", "tts", "stt", "gpu1", "gpu2", "gpu3")
OWN_WRITES = ("invokeai", "comfyui")
"""Images of others that write to their own folders and begin as root."""
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def runs_once(said: Json) -> bool:
    return said.get("restart") == "no"


def of_others(said: Json) -> bool:
    return any(name in said["image"] for name in OWN_WRITES)


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m)", text)
    assert match, text
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


def checks_itself(target: str) -> bool:
    """Whether the image of this target has a HEALTHCHECK, or the one that it is made from."""
    found = re.search(rf"^FROM (\S+) AS {target}$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert found, target
    return "\nHEALTHCHECK " in found[2] or (found[1] in DOCKERFILE.split() and checks_itself(found[1]))


@pytest.mark.parametrize("name", STACKS)
def test_images_have_a_tag(name: str):
    """No `latest`, and none without a word on which."""
    for said in stack(*STACKS[name]).values():
        assert re.fullmatch(r"[\w./-]+:[\w][\w.-]*(@sha256:[0-9a-f]{64})?", said["image"])
        assert ":latest" not in said["image"]


@pytest.mark.parametrize("name", STACKS)
def test_containers_are_bounded(name: str):
    """Memory, processes and logs have an end; what dies is started again, unless it runs once."""
    for service, said in stack(*STACKS[name]).items():
        limits = said["deploy"]["resources"]["limits"]
        assert limits["memory"], service
        assert int(limits["pids"]) > 0, service
        assert said["logging"]["options"]["max-size"], service
        assert said["restart"] in {"unless-stopped", "no"}, service
        assert said["init"] is True, service


@pytest.mark.parametrize("name", STACKS)
def test_containers_may_do_little(name: str):
    """No capability but those named, no new privileges; not root, and nothing to write to but what is mounted."""
    for service, said in stack(*STACKS[name]).items():
        assert said["cap_drop"] == ["ALL"], service
        assert said["security_opt"] == ["no-new-privileges:true"], service
        assert not said.get("privileged"), service
        if of_others(said):
            continue
        assert said["read_only"] is True, service
        assert said["tmpfs"][0].startswith("/tmp:"), service
        assert runs_once(said) or said["user"] == "10001:10001", service


@pytest.mark.parametrize("name", STACKS)
def test_containers_are_watched(name: str):
    """By a check of the compose file, or one that the image has."""
    for service, said in stack(*STACKS[name]).items():
        own = said.get("healthcheck", {}).get("test")
        assert runs_once(said) or own or checks_itself(said["build"]["target"]), service


@pytest.mark.parametrize("name", STACKS)
def test_only_the_door_is_open(name: str):
    """One service publishes a port, on this host's own address unless .env says otherwise."""
    published = {service: said["ports"] for service, said in stack(*STACKS[name]).items() if said.get("ports")}
    door = "caddy" if name in {"scale", "tls", "ledger"} else "gateway"
    inside = {service for service in published if service != door}
    assert inside == ({"nats", "etcd"} if name == "prod" else set())
    if not name.startswith("workers"):
        assert "127.0.0.1:8800:8800" in published[door]
    if name != "tls":
        assert len(published.get(door, [])) == {"dev": 2}.get(name, 0 if name.startswith("workers") else 1)


def test_servers_have_no_way_out():
    """NATS, etcd and Redis are on one network, which ends at this host."""
    assert top(BASE)["networks"]["backbone"]["internal"] is True
    services = stack(BASE)
    assert [services[name]["networks"] for name in ("nats", "etcd", "redis")] == [["backbone"]] * 3
    assert set(services["gateway"]["networks"]) == {"edge", "backbone"}


@pytest.mark.parametrize("name", STACKS)
def test_environment_is_known(name: str):
    """Every variable that Nexus's own processes are given is a setting of theirs, or OpenTelemetry's."""
    others = {"WATCHFILES_FORCE_POLLING"}
    for service, said in stack(*STACKS[name]).items():
        if not re.search(r"nexus-(gateway|worker)(-dev)?:", said["image"]) or runs_once(said):
            continue
        kind = GatewaySettings if service == "gateway" else WorkerSettings
        known = {field.upper() for field in kind.model_fields} | others
        assert {name for name in said["environment"] if not name.startswith("OTEL_")} <= known, service


def test_workers_hear_of_every_setting_of_theirs():
    """All but where Redis is: what .env says of workers reaches them, also on another host."""
    worker = stack(WORKERS)["worker"]["environment"]
    settings = {name for name in worker if not name.startswith("OTEL_")}
    assert settings == {name.upper() for name in WorkerSettings.model_fields if not name.startswith("redis")}


@pytest.mark.parametrize("name", STACKS)
def test_workers_have_no_key(name: str):
    """The gateway's key is the gateway's: no worker and no server has the file of settings that may hold it."""
    for service, said in stack(*STACKS[name]).items():
        if service != "gateway":
            assert "env_file" not in said, service
            assert not any("GATEWAY_BEARER" in one for one in said.get("environment") or ()), service


@pytest.mark.parametrize("name", ["base", "scale", "prod", "workers"])
def test_there_is_time_to_end(name: str):
    """A container is killed later than its process says that it is done."""
    gateway, worker = GatewaySettings.model_fields, WorkerSettings.model_fields
    for service, said in stack(*STACKS[name]).items():
        grace = seconds(said.get("stop_grace_period", "10s"))
        if service == "gateway":
            assert grace > gateway["gateway_lame_duck_s"].default + gateway["gateway_drain_s"].default + 5
        elif service.startswith("worker"):
            assert grace > worker["worker_drain_s"].default + 5


def test_everybody_knows_all_nodes_of_a_cluster():
    """Gateways and the workers of each profile: none of them is lost with one node."""
    services = stack(*STACKS["cluster"])
    nexus = [said["environment"] for name, said in services.items() if name.startswith(("gateway", "worker"))]
    assert len(nexus) == 2 + len(PROFILES)
    for setting, part in (("NATS_URL", "nats"), ("ETCD_URL", "etcd")):
        told = {said[setting] for said in nexus}
        assert [[urlsplit(url).hostname for url in urls.split(",")] for urls in told] == [
            [part, f"{part}-2", f"{part}-3"]
        ]


@pytest.mark.parametrize("base", [BASE, WORKERS])
@pytest.mark.parametrize("profile", PROFILES)
def test_each_server_has_its_worker(base: str, profile: str):
    """A profile is a server and the worker beside it, which knows its kind and its address, and waits for it."""
    inside = {name: said for name, said in stack(base).items() if profile in said.get("profiles", [])}
    server, worker = sorted(inside, key=lambda name: name.startswith("worker-"))
    assert worker == f"worker-{server}"
    environment = inside[worker]["environment"]
    assert environment["WORKER_BACKEND"] in load_adapters()
    assert urlsplit(environment["WORKER_BACKEND_URL"]).hostname == server
    assert inside[worker]["depends_on"][server] == {"condition": "service_healthy"}
    assert set(inside[server]["networks"]) & set(inside[worker]["networks"])


@pytest.mark.parametrize("name", ["gpu", "workers with GPUs"])
def test_each_gpu_has_its_server(name: str):
    """Each server that wants a GPU has one of its own by name, and each of Ollama's another one."""
    services = stack(*STACKS[name])
    mine = {
        service: said["deploy"]["resources"]["reservations"]["devices"]
        for service, said in services.items()
        if "reservations" in said["deploy"]["resources"]
    }
    assert set(mine) == {"ollama", "ollama-gpu1", "ollama-gpu2", "ollama-gpu3", "invokeai", "comfyui"}
    assert all(len(devices) == 1 and devices[0]["driver"] == "nvidia" for devices in mine.values())
    ids = [mine[service][0]["device_ids"] for service in sorted(mine) if service.startswith("ollama")]
    assert ids == [["0"], ["1"], ["2"], ["3"]]
    assert not any(service.startswith("worker") for service in mine), "a worker needs none"


def documented() -> dict[str, str]:
    section = EXAMPLE.read_text().partition(COMPOSE)[2]
    return {match[1]: match[2] for line in section.splitlines() if (match := SETTING.fullmatch(line))}


def test_compose_variables_are_documented():
    """Each with the default of the first file that has it; and none is that does not exist."""
    files = [ROOT / BASE, ROOT / COMMON, *sorted(ROOT.glob("docker-compose.*.yml"))]
    used: dict[str, str] = {}
    for path in files:
        for name, default in variables(path).items():
            used.setdefault(name, default)
    compose_own = {"COMPOSE_PROFILES": "", "COMPOSE_FILE": BASE}
    shell = {"HOSTNAME"}
    expected = {name: value for name, value in used.items() if name not in defaults() and name not in shell}
    assert documented() == expected | compose_own


@pytest.mark.parametrize("name", STACKS)
def test_compose_takes_the_files(name: str):
    """The real one, with each profile."""
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], check=False).returncode:
        pytest.skip("docker compose is not installed")
    files = [part for file in STACKS[name] for part in ("-f", file)]
    needed = {"NATS_URL": "nats://n:4222", "ETCD_URL": "http://e:2379", "NEXUS_SITE": "localhost"}
    needed |= {"NEXUS_BIND_ADDRESS": "127.0.0.1", "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}
    command = ["docker", "compose", "--env-file", ".env.example", *files, "--profile", "*", "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=needed, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_dockerfile_has_no_faults():
    """As hadolint sees it."""
    hadolint = Path(sys.executable).with_name("hadolint")
    for file in ("deploy/Dockerfile", "tests/deploy/caddy/Dockerfile"):
        done = subprocess.run([hadolint, file], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout
