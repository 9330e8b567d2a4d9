"""Scripts in themselves: clean for ShellCheck, on bash 3.2 too, with help and honest exit codes; what a host lacks is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import free_port
from tests.deploy.scripts import DONE, FAILED, MISSING, SCRIPTS, USAGE, Said, run
from tests.servers import ROOT

LIB = SCRIPTS / "lib.sh"
PROGRAMS = sorted([*SCRIPTS.glob("*.sh"), ROOT / "quickstart.sh"], key=lambda path: path.name)
PROGRAMS.remove(LIB)
names = pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.name)

NOT_IN_BASH_3 = {
    "mapfile or readarray": r"\b(mapfile|readarray)\b",
    "associative arrays, name references": r"\b(declare|local|typeset) +-[a-zA-Z]*[An]",
    "case conversion": r"\$\{\w+(\[[^]]*\])?(,|\^)",
    "&>> and |&": r"&>>|\|&",
    "coproc": r"\bcoproc\b",
    "negative subscripts": r"\$\{\w+\[-",
    "printf's time": r"printf[^|;]*%\([^)]*\)T",
    "wait -n": r"\bwait -n\b",
    "EPOCHSECONDS": r"\bEPOCH(SECONDS|REALTIME)\b",
}


def every_script() -> list[Path]:
    """What git knows, or would take, and begins as a shell's; and what scripts source."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    files = [path for line in listed if line and (path := ROOT / line).is_file()]
    return [path for path in files if path.suffix == ".sh" or re.match(rb"#!.*\b(ba)?sh\b", path.open("rb").readline())]


def test_shellcheck_finds_nothing_in_any_script() -> None:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, *every_script()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@names
def test_a_script_explains_itself_and_how_it_ends(script: Path) -> None:
    said = run(script, "--help")
    assert said.code == DONE
    assert said.out.startswith("Usage: ")
    assert "--help" in said.out
    assert re.search(r"^Exit|\bExit: ", said.out, re.MULTILINE), "its exit codes are not documented"
    assert not said.err


@names
def test_a_script_refuses_an_option_that_it_does_not_have(script: Path) -> None:
    said = run(script, "--no-such-option")
    assert said.code == USAGE, said.all
    assert "--no-such-option" in said.err
    assert "--help" in said.err


@names
def test_a_script_can_be_run_and_stops_at_the_first_error(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


@names
def test_a_script_uses_nothing_that_the_bash_of_macos_lacks(script: Path) -> None:
    code = "\n".join(line for line in script.read_text().splitlines() if not line.lstrip().startswith("#"))
    for what, pattern in NOT_IN_BASH_3.items():
        found = re.search(pattern, code)
        assert not found, f"{what}: {found and found.group()}"
    # With `set -u` an empty list is an error there, unless it is written ${list[@]+"${list[@]}"}.
    emptied = set(re.findall(r"\b(\w+)=\(\)", code))
    for name in emptied:
        bare = re.sub(rf'\$\{{{name}\[@\]\+"\$\{{{name}\[@\]\}}"\}}', "", code)
        guarded = re.search(rf"\$\{{#{name}\[@\]\}}", code)  # its length was looked at before
        assert guarded or f'"${{{name}[@]}}"' not in bare, f"{name} may be empty"


# --- What all share: JSON and .env in bash and awk ------------------------------------------------------------------------


def in_lib(code: str, given: str = "", *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . '{LIB}'; {code}", "lib", *words],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_is_read_with_awk_alone() -> None:
    document = {"a": {"b": [1, 'x é "y" \\ / \t 😀', {}, []], "c-d": None}, "e": True, "f": -1.5e-7}
    for text in (json.dumps(document), json.dumps(document, indent=2), json.dumps(document, ensure_ascii=False)):
        flat = in_lib("nx_json", text)
        assert flat.returncode == 0
        paths = [line.split("\t")[0] for line in flat.stdout.splitlines()]
        assert paths == ["a.b.0", "a.b.1", "a.b.2", "a.b.3", "a.c-d", "e", "f"]
        assert in_lib("nx_json_get a.b.1", text).stdout == 'x é "y" \\ / \t 😀\n'


@pytest.mark.parametrize(
    "text", ["", "{", "[1,]", '{"a":}', "abc", '{"a":1}}', '"x', "[1 2]", '{"a" 1}', "{1: 2}", "[}"]
)
def test_what_is_no_json_is_refused(text: str) -> None:
    assert in_lib("nx_json >/dev/null", text).returncode != 0


def test_any_text_becomes_a_json_string() -> None:
    text = 'a "quoted" \\ back\nslash\ttab é 😀'
    assert json.loads(in_lib('nx_json_string "$1"', "", text).stdout) == text


def test_env_is_read_as_compose_reads_it_and_set_in_place(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("# c\nA=first\nexport B='b # not a comment'\nC=\"c\"\r\nD = d # a comment\nA=last\n#E=5\n")
    assert [in_lib(f"nx_env_get {env} {name}").stdout for name in "ABCDE"] == [
        "last\n",
        "b # not a comment\n",
        "c\n",
        "d\n",
        "",
    ]
    env.chmod(0o600)
    for name, value in {"A": "n&w\\x", "E": "e", "F": "f"}.items():
        assert in_lib('nx_env_set "$1" "$2" "$3"', "", str(env), name, value).returncode == 0
    assert [in_lib(f"nx_env_get {env} {name}").stdout for name in "AEF"] == ["n&w\\x\n", "e\n", "f\n"]
    assert env.read_text().count("A=") == 1
    assert env.stat().st_mode & 0o777 == 0o600


# --- preflight-check.sh -----------------------------------------------------------------------------------------------------


def preflight(*words: str, env: Path, **settings: Any) -> tuple[Said, dict[str, dict[str, str]]]:
    said = run("preflight-check.sh", "--json", "--env", str(env), *words, **settings)
    told = json.loads(said.out)
    assert told["ok"] == (said.code == DONE)
    return said, {check["name"]: check for check in told["checks"]}


@pytest.fixture
def env(tmp_path: Path) -> Path:
    path = tmp_path / ".env"
    path.write_text((ROOT / ".env.example").read_text())
    path.chmod(0o600)
    return path


def free_ports() -> dict[str, str]:
    return {"GATEWAY_PORT": str(free_port()), "OBSERVABILITY_PORT": str(free_port())}


def test_a_host_with_python_and_make_is_ready_for_the_embedded_stack(env: Path) -> None:
    said, checks = preflight("--embedded", env=env, **free_ports())
    assert said.code == DONE, said.out
    assert {"bash", "curl", "openssl", "python", "make", "disk", "memory", ".env", "data"} <= set(checks)
    assert checks["python"]["status"] == checks["make"]["status"] == "ok"


def test_a_port_that_somebody_has_is_named_with_its_setting(env: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said, checks = preflight("--embedded", env=env, **(free_ports() | {"GATEWAY_PORT": port}))
    assert said.code == FAILED
    assert checks[f"port {port}"]["status"] == "fail"
    assert "GATEWAY_PORT" in checks[f"port {port}"]["hint"]


@pytest.mark.parametrize(
    ("line", "name", "status"),
    [
        ("GATEWAY_BEARER_TOKEN=change-me-in-production", "key", "fail"),
        ("GATEWAY_BEARER_TOKEN=short-one", "key", "warn"),
        ("GATEWAY_BEARER_TOKEN=nexus-0123456789abcdefghijkl", "key", "ok"),
        ("GATEWAY_PROT=8800", ".env", "warn"),
        ("DEFAULT_BACKEND=ollama\nETCD_ENABLED=true", ".env", "warn"),
        ("MAX_QUEUE_BYTES=4GB", "disk", "fail"),
        ("MAX_BLOB_BYTES=1099511627776000", "disk", "warn"),
    ],
)
def test_settings_are_looked_at(env: Path, line: str, name: str, status: str) -> None:
    env.write_text(env.read_text() + line + "\n")
    said, checks = preflight("--embedded", env=env, **free_ports())
    assert checks[name]["status"] == status, checks[name]
    assert said.code == (FAILED if status == "fail" else DONE)
    if name == "key":
        assert line.split("=")[1] not in said.all, "the key was printed"
    elif status == "warn" and "PROT" in line:
        assert "GATEWAY_PROT" in checks[name]["detail"]


def test_a_host_without_docker_is_told_so(env: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in (
        "bash",
        "awk",
        "sed",
        "grep",
        "cat",
        "cut",
        "tr",
        "sort",
        "uniq",
        "head",
        "tail",
        "df",
        "du",
        "find",
        "id",
        "dirname",
        "curl",
        "openssl",
    ):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    said, checks = preflight(env=env, PATH=str(tools), **free_ports())
    assert said.code == FAILED
    assert checks["docker"]["status"] == "fail"
    assert "install-host-deps.sh" in checks["docker"]["hint"]


def test_a_gpu_that_is_asked_for_and_not_there_is_missed(env: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this host has a GPU")
    said, checks = preflight("--worker", "--gpu", env=env)
    assert said.code == FAILED
    assert checks["gpu"]["status"] == "fail"


@pytest.fixture
def production(tmp_path: Path) -> Path:
    """Another checkout, with secrets: what production's checks look at."""
    folder = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, folder / "deploy" / "scripts")
    shutil.copytree(ROOT / "deploy" / "nats", folder / "deploy" / "nats")
    for file in (*ROOT.glob("docker-compose*.yml"), ROOT / ".env.example"):
        shutil.copy(file, folder)
    shutil.copy(ROOT / ".env.example", folder / ".env")
    assert run(folder / "deploy" / "scripts" / "make-secrets.sh").code == DONE
    return folder


def production_checks(production: Path) -> dict[str, Any]:
    said = run(production / "deploy" / "scripts" / "preflight-check.sh", "--json", "--prod")
    return {check["name"]: check["status"] for check in json.loads(said.out)["checks"]}


def test_production_wants_an_etcd_whose_roles_hold(production: Path) -> None:
    assert production_checks(production)["etcd"] == "ok"
    compose = production / "docker-compose.yml"
    for version in ("v3.5.16", "v3.6.0"):
        compose.write_text(re.sub(r"etcd:v[\d.]+", f"etcd:{version}", compose.read_text()))
        assert production_checks(production)["etcd"] == "fail"


def test_secrets_of_an_earlier_version_lack_certificates(production: Path) -> None:
    assert "certificates" not in production_checks(production)
    (production / ".runtime" / "secrets" / "worker" / "etcd-client.crt").unlink()
    assert production_checks(production)["certificates"] == "fail"
    assert run(production / "deploy" / "scripts" / "make-secrets.sh").code == DONE
    assert "certificates" not in production_checks(production)


# --- install-host-deps.sh ---------------------------------------------------------------------------------------------------

SYSTEMS = {
    "debian": ("ID=debian\nVERSION_CODENAME=bookworm\n", "https://download.docker.com/linux/debian bookworm stable"),
    "ubuntu": (
        "ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\nUBUNTU_CODENAME=noble\n",
        "https://download.docker.com/linux/ubuntu noble stable",
    ),
    "mint": (
        'ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble\n',
        "https://download.docker.com/linux/ubuntu noble stable",
    ),
    "fedora": ("ID=fedora\nVERSION_ID=42\n", "https://download.docker.com/linux/fedora/docker-ce.repo"),
    "rocky": ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "https://download.docker.com/linux/centos/docker-ce.repo"),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_gets_dockers_own_packages(system: str, tmp_path: Path) -> None:
    release, source = SYSTEMS[system]
    (tmp_path / "os-release").write_text(release)
    host: dict[str, Any] = {
        "NX_UNAME": "Linux",
        "NX_OS_RELEASE": str(tmp_path / "os-release"),
        "NX_ASSUME_BARE": "true",
    }
    said = run("install-host-deps.sh", "--dry-run", "--nvidia", **host)
    assert said.code == DONE, said.all
    assert source in said.out
    assert "docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin" in said.out
    assert "nvidia-ctk runtime configure --runtime=docker" in said.out
    assert "usermod" not in said.out, "a group that is as good as root is joined only when asked"


def test_macos_is_served_by_homebrew() -> None:
    said = run("install-host-deps.sh", "--dry-run", NX_UNAME="Darwin", NX_ASSUME_BARE="true")
    assert said.code == DONE
    assert "brew install colima docker docker-compose" in said.out


def test_a_system_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text("ID=plan9\nPRETTY_NAME='Plan 9'\n")
    said = run("install-host-deps.sh", "--dry-run", NX_UNAME="Linux", NX_OS_RELEASE=str(tmp_path / "os-release"))
    assert said.code == MISSING
    assert "Plan 9" in said.err


# --- quickstart.sh ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This tree under another folder, where .env and data may be made."""
    copy = tmp_path / "nexus"
    copy.mkdir()
    own = {".git", ".env", ".nexus", ".runtime", "quickstart.sh", "deploy", ".env.example"}
    for entry in ROOT.iterdir():
        if entry.name not in own:
            (copy / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "deploy" / "scripts", copy / "deploy" / "scripts")
    for name in ("install.py", "console.py"):
        shutil.copy2(ROOT / "deploy" / name, copy / "deploy" / name)
    for name in ("quickstart.sh", ".env.example"):
        shutil.copy2(ROOT / name, copy / name)
    return copy


def test_quickstart_takes_a_fresh_checkout_to_an_answer_without_docker(checkout: Path) -> None:
    ports = free_ports()
    flags = f"--no-local-models --no-discover --port {ports['GATEWAY_PORT']} --observability-port {ports['OBSERVABILITY_PORT']}"
    script, folder = checkout / "quickstart.sh", checkout / ".nexus"
    # A file of process ids means nothing: this one names a process that runs, and is no Nexus.
    folder.mkdir()
    (folder / "quickstart.pid").write_text(f"{os.getpid()}\n")
    (folder / "quickstart.log").write_text("Nexus is up.\n")
    try:
        first = run(script, "--yes", "--embedded", "--timeout", "90", "--up", flags, cwd=checkout)
        assert first.code == DONE, first.all
        assert (checkout / ".env").read_text() == (checkout / ".env.example").read_text()
        assert "What is gravity?" in first.out.splitlines()[-1]
        key = (folder / "key").read_text().strip()
        assert key not in first.all, "the key was printed"
        logs = [*folder.glob("*.log"), *folder.glob("logs/*.log")]
        assert [log for log in logs if key in log.read_text(errors="replace")] == [], "the key was logged"
        # The line that it prints works as it stands.
        line = next(line for line in first.out.splitlines() if line.startswith("curl "))
        done = subprocess.run(["bash", "-c", line], cwd=checkout, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        # Again: it is found running, and .env is nobody's but its owner's.
        (checkout / ".env").write_text("LOG_LEVEL=info\n")
        state = (folder / "state.json").read_text()
        again = run(script, "--yes", "--embedded", "--up", flags, cwd=checkout)
        assert again.code == DONE, again.all
        assert (folder / "state.json").read_text() == state
        assert (checkout / ".env").read_text() == "LOG_LEVEL=info\n"
        assert "nexus down" in again.err
    finally:
        down = ["bash", "-c", ".venv/bin/nexus down"]
        stopped = subprocess.run(down, cwd=checkout, capture_output=True, text=True, timeout=40, check=False)
    assert stopped.stdout.endswith("Stopped.\n"), stopped


def test_quickstart_starts_nothing_on_a_host_that_is_not_ready(checkout: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run(
            checkout / "quickstart.sh", "--yes", "--embedded", cwd=checkout, GATEWAY_PORT=str(taken.getsockname()[1])
        )
    assert said.code == FAILED
    assert "somebody else listens there" in said.err
    assert not (checkout / ".env").exists()
    assert not (checkout / ".nexus").exists()
