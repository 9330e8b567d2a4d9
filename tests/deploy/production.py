"""Servers as deploy/ configures them for production, as processes: the committed files, with secrets made by make-secrets.sh."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from backbone.registry.auth import EtcdAccess, EtcdTls
from backbone.registry.users import create_users
from cli.embedded.servers import HOST, EtcdServer, NatsServer, RedisServer, free_port
from tests.servers import ROOT, EmbeddedSource, Server

DEPLOY = ROOT / "deploy"


class Secrets:
    """What make-secrets.sh made in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, *options: str) -> None:
        """Run the script."""
        script = DEPLOY / "scripts" / "make-secrets.sh"
        subprocess.run([script, "--dir", self.folder, *options], check=True, capture_output=True, timeout=60)

    def file(self, name: str) -> str:
        """The path of one."""
        return str(self.folder / name)

    def text(self, name: str) -> str:
        """What is in one."""
        return (self.folder / name).read_text().strip()

    @property
    def etcd_passwords(self) -> dict[str, str]:
        """By user of etcd."""
        folders = {"root": "admin", "gateway": "gateway", "worker": "worker"}
        return {user: self.text(f"{folder}/etcd-password") for user, folder in folders.items()}

    @cached_property
    def client_context(self) -> ssl.SSLContext:
        """What anybody has who knows the authority."""
        return ssl.create_default_context(cafile=self.file("ca/ca.crt"))

    def etcd_context(self, folder: str = "admin") -> ssl.SSLContext:
        """With the certificate that etcd asks for, of one process's folder."""
        context = ssl.create_default_context(cafile=self.file("ca/ca.crt"))
        context.load_cert_chain(self.file(f"{folder}/etcd-client.crt"), self.file(f"{folder}/etcd-client.key"))
        return context

    def etcd_tls(self, folder: str = "admin") -> EtcdTls:
        """The same for Nexus's own client."""
        names = ("ca.crt", "etcd-client.key", "etcd-client.crt")
        return EtcdTls(*((self.folder / folder / name).read_bytes() for name in names))


class ProductionNats(NatsServer):
    """deploy/nats/nats.conf, on another port and folder."""

    scheme = "tls"

    def __init__(self, data_dir: Path, secrets: Secrets) -> None:
        super().__init__(data_dir)
        self.secrets = secrets
        self.monitor_port = free_port()

    def _arguments(self) -> list[str]:
        for file in (DEPLOY / "nats").glob("*.conf"):
            text = file.read_text().replace('store_dir: "/data"', f"store_dir: {json.dumps(str(self.data_dir))}")
            # Not by flags: a reload refuses a name that a flag gave.
            text = text.replace("server_name: nexus-nats", f"server_name: {self._identity}")
            (self.data_dir / file.name).write_text(text)
        link = self.data_dir / "secrets"
        if not link.exists():
            link.symlink_to(self.secrets.folder / "nats")
        return [
            "-c",
            "nats.conf",
            "-a",
            HOST,
            "-p",
            str(self.port),
            "-m",
            str(self.monitor_port),
        ]

    def reload(self) -> None:
        """As SIGHUP to the server, twice: it reads users and permissions again, and connects a new account at the second."""
        for _ in range(2):
            before = self._reloads()
            subprocess.run([self.binary.find(), "--signal", f"reload={self.pid}"], check=True, capture_output=True)
            until = time.monotonic() + 20
            while self._reloads() == before and time.monotonic() < until:
                time.sleep(0.02)

    def _reloads(self) -> int:
        return self.log_file.read_text().count("Reloaded server configuration")


class ProductionEtcd(EtcdServer):
    """deploy/etcd/etcd.yaml, on other ports and folder, with users and authentication."""

    scheme = "https"

    def __init__(self, data_dir: Path, secrets: Secrets, *, token_ttl_s: int = 300) -> None:
        super().__init__(data_dir)
        self.secrets = secrets
        self.token_ttl_s = token_ttl_s

    def _arguments(self) -> list[str]:
        peer = f"http://{HOST}:{free_port()}"
        text = (DEPLOY / "etcd" / "etcd.yaml").read_text()
        for old, new in {
            "name: etcd": f"name: {self._identity}",
            "/data": str(self._store),
            "https://0.0.0.0:2379": self.url,
            "https://etcd:2379": self.url,
            "initial-cluster: etcd=": f"initial-cluster: {self._identity}=",
            "http://127.0.0.1:2380": peer,
            "/etc/etcd/secrets": self.secrets.file("etcd"),
            "auth-token-ttl: 300": f"auth-token-ttl: {self.token_ttl_s}",
        }.items():
            assert old in text, old
            text = text.replace(old, new)
        config = self.data_dir / "etcd.yaml"
        config.write_text(text)
        return ["--config-file", str(config)]

    async def _is_ready(self) -> bool:
        reader, writer = await asyncio.open_connection(HOST, self.port, ssl=self.secrets.etcd_context())
        try:
            writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            return b'"health":"true"' in await reader.read()
        finally:
            writer.close()

    async def start(self) -> None:
        await super().start()
        access = EtcdAccess(self.url, self.secrets.etcd_tls())
        await create_users(access, "/nexus/", self.secrets.etcd_passwords)


class ProductionRedis(RedisServer):
    """deploy/redis/redis.conf, on another port and folder, and without TLS: the wheel's Valkey was built without it."""

    def __init__(self, data_dir: Path, secrets: Secrets) -> None:
        super().__init__(data_dir)
        self.secrets = secrets

    @property
    def url(self) -> str:
        return f"redis://gateway@{HOST}:{self.port}/0"

    def _arguments(self) -> list[str]:
        lines = (DEPLOY / "redis" / "redis.conf").read_text().splitlines()
        text = "\n".join(line for line in lines if not line.startswith(("tls-", "port ")))
        text = text.replace("/usr/local/etc/redis/secrets", self.secrets.file("redis")).replace(
            "dir /data", f"dir {self.data_dir}"
        )
        config = self.data_dir / "redis.conf"
        config.write_text(f"{text}\nport {self.port}\nbind {HOST}\n")
        return [str(config)]

    async def _is_ready(self) -> bool:
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            writer.write(b"PING\r\n")
            return (await reader.readline()).startswith((b"-NOAUTH", b"+PONG"))
        finally:
            writer.close()


class ProductionSource(EmbeddedSource):
    """For a `Cluster`."""

    def __init__(self, secrets: Secrets) -> None:
        self.secrets = secrets

    def nats(self, folder: Path) -> Server:
        return ProductionNats(folder, self.secrets)

    def etcd(self, folder: Path) -> Server:
        return ProductionEtcd(folder, self.secrets)

    def redis(self, folder: Path) -> Server:
        return ProductionRedis(folder, self.secrets)


def gateway_settings(secrets: Secrets) -> dict[str, str]:
    """As docker-compose.prod.yml gives them."""
    return {
        "NATS_USER": "gateway",
        "NATS_PASSWORD_FILE": secrets.file("gateway/nats-password"),
        "NATS_TLS_CA": secrets.file("gateway/ca.crt"),
        "ETCD_USER": "gateway",
        "ETCD_PASSWORD_FILE": secrets.file("gateway/etcd-password"),
        "ETCD_TLS_CA": secrets.file("gateway/ca.crt"),
        "ETCD_TLS_CERT": secrets.file("gateway/etcd-client.crt"),
        "ETCD_TLS_KEY": secrets.file("gateway/etcd-client.key"),
        "REDIS_PASSWORD_FILE": secrets.file("gateway/redis-password"),
    }


def worker_settings(secrets: Secrets, user: str = "worker") -> dict[str, Any]:
    """As docker-compose.worker.yml wants them; a user of its own has a folder of its own."""
    folder = "worker" if user == "worker" else f"worker-{user}"
    return {
        "NATS_USER": user,
        "NATS_PASSWORD_FILE": secrets.file(f"{folder}/nats-password"),
        "NATS_TLS_CA": secrets.file(f"{folder}/ca.crt"),
        "ETCD_USER": "worker",
        "ETCD_PASSWORD_FILE": secrets.file(f"{folder}/etcd-password"),
        "ETCD_TLS_CA": secrets.file(f"{folder}/ca.crt"),
        "ETCD_TLS_CERT": secrets.file(f"{folder}/etcd-client.crt"),
        "ETCD_TLS_KEY": secrets.file(f"{folder}/etcd-client.key"),
    }


def worker_block(folder: Path, name: str, *options: str) -> None:
    """What `nexus permissions worker` prints, where make-secrets.sh finds it."""
    from typer.testing import CliRunner

    from cli.app import app

    result = CliRunner().invoke(app, ["permissions", "worker", name, *options])
    assert result.exit_code == 0, result.output
    target = folder / "nats" / "workers" / f"{name}.conf"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(result.output)


def log_lines(file: Path) -> list[Mapping[str, object]]:
    """A process's JSON log lines."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
