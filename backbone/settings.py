"""Settings: environment variables, one class per process, read once at the edge and passed in.

Every field here is documented in `.env.example`; a test holds the two against each other.
"""

from __future__ import annotations

import socket
from ipaddress import ip_network
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.hops import MAX_HOPS

PUBLIC_ROUTES = frozenset({"", "metrics", "docs", "readiness"})


class CommonSettings(BaseSettings):
    """What every process of Nexus reads."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True)

    nats_url: str = "nats://127.0.0.1:4222"
    nats_user: str = ""
    nats_password: SecretStr | None = None
    nats_password_file: str = ""
    """Holds the password. Read at each connection: a changed one needs no restart."""
    nats_creds_file: str = ""
    """A user's JWT and seed, in the place of user and password."""
    nats_tls_ca: str = ""
    """PEM of the authority that NATS's certificate must come from. Set, or with `tls://`: never without TLS."""
    nats_tls_cert: str = ""
    nats_tls_key: str = ""
    nats_inbox_prefix: str = ""
    """Before all inboxes; empty: `_INBOX.<NATS_USER>`, or `_INBOX` without a user."""
    etcd_url: str = "http://127.0.0.1:2379"
    etcd_prefix: str = "/nexus/"
    etcd_user: str = ""
    etcd_password: SecretStr | None = None
    etcd_password_file: str = ""
    """Holds the password. Read at each login: a changed one needs no restart."""
    etcd_tls_ca: str = ""
    """PEM of the authority that etcd's certificate must come from, for `https` URLs; empty: the system's."""
    etcd_tls_cert: str = ""
    etcd_tls_key: str = ""
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_password_file: str = ""
    """Holds the password that REDIS_URL lacks. Read at each connection."""
    redis_tls_ca: str = ""
    """PEM of the authority that Redis's certificate must come from, for `rediss` URLs; empty: the system's."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto`: `console` where standard output is a terminal, else `json`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False
    """Log request bodies at debug level. Off: prompts are nobody's business but their owner's."""
    ack_wait_s: float = Field(default=15.0, gt=0)
    """Seconds without a sign of life after which a worker counts as dead and its job goes to another."""


class GatewaySettings(CommonSettings):
    """The gateway's settings."""

    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=8800, ge=0, le=65535)
    observability_host: str = "127.0.0.1"
    observability_port: int = Field(default=8801, ge=0, le=65535)
    """`/metrics`, `/docs`, `/health` and `/readyz` without a key. The n-th process of `GATEWAY_WORKERS` takes this port + n."""
    public_routes: str = ""
    """Comma-separated parts of the observability port that are on the API's port too: `metrics`, `docs`, `readiness` (details)."""
    gateway_bearer_token: SecretStr | None = None
    """The bootstrap admin key. Without one, only keys that were created before work."""
    gateway_bearer_token_file: str = ""
    """Holds the bootstrap key where `GATEWAY_BEARER_TOKEN` is not set; made, with a random key, where it is missing."""
    gateway_workers: int = Field(default=1, ge=1, le=64)
    """Gateway processes sharing the port."""
    gateway_max_hops: int = Field(default=0, ge=0, le=MAX_HOPS)
    """Through how many other Nexus gateways a request may come; 0 refuses the requests of Nexus's workers."""
    gateway_lame_duck_s: float = Field(default=5.0, ge=0)
    """Seconds that a gateway which was told to stop goes on accepting requests, while `/readyz` says 503 and load balancers turn
    away. 0 where there is none."""
    gateway_drain_s: float = Field(default=20.0, ge=0)
    """Seconds that open requests get to finish after that; what is left is answered with an error."""
    max_connections: int = Field(default=8192, ge=1)
    """Connections that a process may have open; more are answered 503 and closed."""
    max_connections_per_address: int = Field(default=2048, ge=1)
    """Of those, from one address, or from one /64 of IPv6. Does not bind `TRUSTED_PROXIES`."""
    trusted_proxies: str = ""
    """Comma-separated addresses and CIDR ranges of proxies and load balancers, whose `X-Forwarded-For` says where callers are."""
    max_wrong_keys: int = Field(default=100, ge=1)
    """Different wrong API keys from one address in a minute; beyond it they are 429 until the minute is over."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without progress after which a connection whose caller does not read its answer is closed."""
    max_unread_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """Memory that answers may take which callers have not read yet; beyond it, those are ended that hold most."""
    max_body_bytes: int = Field(default=32 * 1024 * 1024, gt=0)
    """Larger request bodies, uploads included, are 413."""
    max_buffered_bytes: int = Field(default=128 * 1024 * 1024, gt=0)
    """Memory that request bodies share: half for bytes that have arrived, half for large JSON bodies while they are checked."""
    fetch_media: bool = False
    """Fetch the http(s) URLs of images in chat messages, from public addresses alone. Off: they are refused."""
    fetch_max_bytes: int = Field(default=20 * 1024 * 1024, gt=0)
    """Of one such URL."""
    fetch_timeout_s: float = Field(default=15.0, gt=0)
    """For one such URL, redirects included."""
    fetch_private_hosts: str = ""
    """Comma-separated `host` or `host:port` that may be fetched although their addresses are private."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds for a request's body to arrive; large ones get a second more for each 64 KiB."""
    queue_timeout_s: float = Field(default=300.0, gt=0)
    first_token_timeout_s: float = Field(default=120.0, gt=0)
    idle_timeout_s: float = Field(default=60.0, gt=0)
    total_timeout_s: float = Field(default=900.0, gt=0)
    load_timeout_s: float = Field(default=600.0, gt=0)
    """For a backend to load a model, where it says that it does; the other limits begin after that."""
    media_timeout_s: float = Field(default=600.0, gt=0)
    """In the place of the first-token and idle limits, where it is longer, for images, sound and model jobs."""
    pull_timeout_s: float = Field(default=21_600.0, gt=0)
    """In the place of the total limit, where it is longer, for a model to be pulled."""
    public_url: str = ""
    """Where callers reach the gateway, `https://nexus.example`, for results fetched by URL; empty: as each request says."""
    result_url_ttl_s: float = Field(default=3600.0, ge=1)
    """How long a result that was asked for by URL can be fetched."""
    max_blob_bytes: int = Field(default=4 * 1024**3, ge=1024 * 1024)
    """Bytes of uploads and large results on NATS's disk; keep it below what the disk has free."""
    queue_comment_after_s: float = Field(default=10.0, gt=0)
    """A stream still queued after this gets `: queued position=N` comments."""
    max_queued_jobs: int = Field(default=100_000, ge=1)
    """Over all queues, running jobs included; beyond it 429."""
    max_queued_per_model: int = Field(default=10_000, ge=1)
    """Per capability, lane and model, running jobs included; beyond it 429."""
    max_queue_bytes: int = Field(default=4 * 1024**3, ge=1024 * 1024)
    """Bytes of the jobs stream on NATS's disk; keep it below what the disk has free."""
    max_queues: int = Field(default=12_000, ge=10)
    """Queues at once, in NATS. One is made per capability, lane and model when it is first used; each takes about 50 KB of NATS's memory."""
    queue_grace_s: float = Field(default=60.0, ge=1)
    """An empty queue is freed when its model has had no live worker for this long."""
    stream_replicas: int = Field(default=1, ge=1, le=5)
    """Replicas of the streams in a NATS cluster."""
    job_keep_s: float = Field(default=604_800.0, ge=60)
    """Records and results of jobs are kept this long after they were submitted."""
    events_keep_s: float = Field(default=86_400.0, ge=60)
    """Events of jobs are kept this long, for callers who resume."""
    job_queue_timeout_s: float = Field(default=86_400.0, gt=0)
    """Seconds that a job may wait for a worker before it expires; `QUEUE_TIMEOUT_S` is for callers who wait."""
    response_keep_s: float = Field(default=2_592_000.0, ge=60)
    """Responses that were retrieved once are kept this long; others as long as their jobs."""
    responses_other_tools: Literal["ignore", "refuse"] = "ignore"
    """Tools in `/v1/responses` that are no functions (`web_search`, `custom`, …), which nothing here runs: `ignore` leaves them
    out, so that agents can begin; `refuse` is 400.
    """
    idempotency_keep_s: float = Field(default=86_400.0, ge=60)
    """How long an Idempotency-Key is remembered."""
    dead_letters_keep_s: float = Field(default=2_592_000.0, ge=60)
    """How long dead letters are kept."""
    max_event_bytes: int = Field(default=2 * 1024**3, ge=1024 * 1024)
    """Bytes of jobs' events on NATS's disk; the oldest are dropped first."""
    max_result_bytes: int = Field(default=2 * 1024**3, ge=1024 * 1024)
    """Bytes of results up to 512 KiB on NATS's disk; the oldest are dropped first. Larger ones count towards `MAX_BLOB_BYTES`."""
    max_file_bytes: int = Field(default=512 * 1024**2, gt=0)
    """Larger files are 413."""
    file_keep_s: float = Field(default=2_592_000.0, ge=3600)
    """How long files are kept at most."""
    batch_window: int = Field(default=256, ge=1, le=10_000)
    """Lines of one batch that are jobs at once: queued or running."""
    webhook_timeout_s: float = Field(default=15.0, gt=0)
    """For one try to tell a webhook."""
    webhook_retries_s: str = "5,300,1800,7200,18000,36000,50400,72000,86400"
    """Comma-separated seconds between the tries to tell a webhook; there is one try more. Standard Webhooks' schedule."""
    webhook_private_hosts: str = ""
    """Comma-separated `host` or `host:port` that webhooks may name although their addresses are private."""
    cors_origins: str = "*"
    """Comma-separated origins that browsers may call from."""

    @property
    def public_names(self) -> frozenset[str]:
        """The names in `public_routes`."""
        return frozenset(name.strip() for name in self.public_routes.split(",") if name.strip())

    @field_validator("public_routes")
    @classmethod
    def _routes(cls, text: str) -> str:
        for name in text.split(","):
            if name.strip() not in PUBLIC_ROUTES:
                raise ValueError(f"holds '{name.strip()}'; it may hold {', '.join(sorted(PUBLIC_ROUTES - {''}))}")
        return text

    @property
    def webhook_delays(self) -> tuple[float, ...]:
        """Seconds between the tries."""
        return tuple(float(part) for part in self.webhook_retries_s.split(",") if part.strip())

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, text: str) -> str:
        for part in text.split(","):
            if part.strip():
                ip_network(part.strip(), strict=False)
        return text

    @field_validator("webhook_retries_s")
    @classmethod
    def _delays(cls, text: str) -> str:
        if any(not 0 <= float(part) <= 604_800 for part in text.split(",") if part.strip()):
            raise ValueError("must be seconds, at most a week each, separated by commas")
        return text


class WorkerSettings(CommonSettings):
    """A worker's settings."""

    worker_backend: str = "echo"
    worker_backend_url: str = ""
    worker_backend_key: SecretStr | None = None
    """API key for the backend, where it wants one."""
    worker_backend_options: str = ""
    """What the adapter alone understands, as `NAME=value,NAME=value`. One that holds a comma stands in double quotes."""
    worker_unsupported_parameters: Literal["adapt", "refuse"] = "adapt"
    """Parameters that a model's server lacks: `adapt` takes the nearest equivalent and names it in `x-nexus-adapted`, `refuse` is 400."""
    worker_models: str = ""
    """Comma-separated; empty: all that the backend serves."""
    worker_concurrency: int = Field(default=0, ge=0)
    """Slots: jobs at once. 0: what the backend says, or the adapter's default."""
    worker_name: str = ""
    """The worker's id; empty: made from host, backend and a random part."""
    worker_lease_s: int = Field(default=10, ge=2)
    """Seconds after which a dead worker vanishes from the registry."""
    worker_drain_s: float = Field(default=25.0, ge=0)
    """Seconds that running jobs get to finish on SIGTERM; what is left is handed back to the queue."""
    worker_health_interval_s: float = Field(default=5.0, gt=0)
    worker_swap_patience_s: float = Field(default=10.0, ge=0)
    """Where a server cannot hold all its models at once: seconds that the jobs of one model may go on while a job of another one waits."""
    worker_observability_host: str = "127.0.0.1"
    worker_observability_port: int = Field(default=0, ge=0, le=65535)
    """`/metrics`, `/health` and `/readyz` of the worker; 0: none."""

    @property
    def host(self) -> str:
        """This machine's name."""
        return socket.gethostname()
