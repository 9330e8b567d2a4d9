"""Settings: environment variables, one class per process, read once at the edge and passed in.

A field's docstring is its documentation: `python -m docs.generator` writes `.env.example`, the reference and the chart's schema from it.
"""

from __future__ import annotations

import socket
from ipaddress import ip_network
from typing import Literal

from pydantic import Field, SecretStr, TypeAdapter, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.hops import MAX_HOPS
from schemas.keys import LaneName

LANE_NAMES = TypeAdapter(tuple[LaneName, ...])
PUBLIC_ROUTES = frozenset({"", "metrics", "docs", "readiness", "status"})


class CommonSettings(BaseSettings):
    """What every process of Nexus reads."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True)

    nats_url: str = "nats://127.0.0.1:4222"
    """URL of NATS with JetStream. Separate several servers with commas."""
    nats_user: str = ""
    """User of NATS, if it requires one. Set `NATS_PASSWORD` or `NATS_PASSWORD_FILE` too."""
    nats_password: SecretStr | None = None
    """Password of that user."""
    nats_password_file: str = ""
    """File with the password. It is read at each connection, so a changed password needs no restart."""
    nats_creds_file: str = ""
    """File with a user's JWT and seed, as `nsc` writes it. It replaces user and password."""
    nats_tls_ca: str = ""
    """PEM file of the authority that signed NATS's certificate. With it, or with a `tls://` URL, nothing is sent
    without TLS.
    """
    nats_tls_cert: str = ""
    """PEM file of this process's own certificate, if NATS requires one."""
    nats_tls_key: str = ""
    """PEM file of that certificate's key."""
    nats_inbox_prefix: str = ""
    """Prefix of this process's inboxes. Empty: `_INBOX.<NATS_USER>`, which is what `nexus permissions` grants, or
    `_INBOX` without a user.
    """
    etcd_url: str = "http://127.0.0.1:2379"
    """URL of etcd, where workers announce themselves. Separate several members with commas."""
    etcd_prefix: str = "/nexus/"
    """Prefix of all keys of Nexus in etcd. It ends with a slash."""
    etcd_user: str = ""
    """User of etcd, if it requires one. Set `ETCD_PASSWORD` or `ETCD_PASSWORD_FILE` too."""
    etcd_password: SecretStr | None = None
    """Password of that user."""
    etcd_password_file: str = ""
    """File with the password. It is read at each login, so a changed password needs no restart."""
    etcd_tls_ca: str = ""
    """PEM file of the authority that signed etcd's certificate, for `https` URLs. Empty: the authorities that the
    system trusts.
    """
    etcd_tls_cert: str = ""
    """PEM file of this process's own certificate, if etcd requires one."""
    etcd_tls_key: str = ""
    """PEM file of that certificate's key."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """URL of Redis or Valkey, which stores jobs' records, keys, files and responses. Only gateways use it. With TLS
    and a user: `rediss://USER:PASSWORD@HOST:6379/0`.
    """
    redis_password_file: str = ""
    """File with the password, if `REDIS_URL` does not contain it. It is read at each connection."""
    redis_tls_ca: str = ""
    """PEM file of the authority that signed Redis's certificate, for `rediss` URLs. Empty: the authorities that the
    system trusts.
    """
    log_format: Literal["auto", "json", "console"] = "auto"
    """`json`: one object per line. `console`: sentences, for people. `auto`: `console` on a terminal, otherwise
    `json`.
    """
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""
    log_ring_bytes: int = Field(default=4 * 1024 * 1024, ge=0, le=64 * 1024 * 1024)
    """Memory of each process for its newest log lines, which `nexus logs REQUEST` searches. 0: the process finds
    nothing.
    """
    tracing: bool = False
    """Export traces as OpenTelemetry (OTLP over HTTP). It needs the extra `otel`; OpenTelemetry's own variables
    (`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER`, …) say where to, and which. Set it for gateways and workers.
    """
    log_prompts: bool = False
    """Log request bodies, at level `debug`. Off by default, because prompts are private to their owners."""
    ack_wait_s: float = Field(default=15.0, gt=0)
    """Seconds of silence after which a worker counts as dead and its job goes to another worker. Use the same value
    in all gateways and workers.
    """


class GatewaySettings(CommonSettings):
    """The gateway's settings."""

    gateway_host: str = "127.0.0.1"
    """Address that the API listens on. `0.0.0.0` for all."""
    gateway_port: int = Field(default=8800, ge=0, le=65535)
    """Port of the API."""
    observability_host: str = "127.0.0.1"
    """Address that `/metrics`, `/docs`, `/health` and the detailed `/readyz` listen on. They require no key."""
    observability_port: int = Field(default=8801, ge=0, le=65535)
    """Port of those routes. Process n of `GATEWAY_WORKERS` uses this port + n."""
    public_routes: str = ""
    """Those routes that the API's port serves too, separated by commas: `metrics`, `docs` (with `/openapi.json`),
    `readiness` (the details). `status` adds the public page `/ui/status` and `/status.json`, which show anybody the names of models.
    """
    gateway_bearer_token: SecretStr | None = None
    """The bootstrap key, which has all scopes. Without it, only keys that were created before are valid. `nexus up`
    makes one.
    """
    gateway_bearer_token_file: str = ""
    """File with the bootstrap key. A missing file is created with a random key. `GATEWAY_BEARER_TOKEN` takes
    precedence.
    """
    gateway_workers: int = Field(default=1, ge=1, le=64)
    """Gateway processes that share the port."""
    gateway_max_hops: int = Field(default=0, ge=0, le=MAX_HOPS)
    """Other Nexus gateways that a request may have passed through, 0 to 8. 0 refuses requests of Nexus workers; 1
    lets another Nexus use this one as an inference server.
    """
    gateway_lame_duck_s: float = Field(default=5.0, ge=0)
    """Seconds after SIGTERM during which the gateway still accepts requests while `/readyz` answers 503, so that
    load balancers stop sending to it. 0 without a load balancer.
    """
    gateway_drain_s: float = Field(default=20.0, ge=0)
    """Seconds after that in which open requests may finish. Then they end in an error."""
    max_connections: int = Field(default=8192, ge=1)
    """Open connections of one process. A further one is answered 503 and closed."""
    max_connections_per_address: int = Field(default=2048, ge=1)
    """Open connections from one address, or from one /64 of IPv6. It does not apply to `TRUSTED_PROXIES`."""
    trusted_proxies: str = ""
    """Addresses and CIDR ranges of load balancers and proxies, separated by commas, such as 10.0.0.0/8. Their
    `X-Forwarded-For` names the caller. Do not list an address that callers can have.
    """
    max_wrong_keys: int = Field(default=100, ge=1)
    """Different wrong API keys per minute from one address. After that the address is answered 429 until the minute
    is over; keys that Nexus made stay valid, the bootstrap key only if that address used it before.
    """
    write_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without progress after which a connection is closed whose caller does not read its answer."""
    max_unread_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """Bytes of memory for answers that callers have not read yet. Above it, the answers of the owner that holds most
    are ended.
    """
    max_body_bytes: int = Field(default=32 * 1024 * 1024, gt=0)
    """Largest request body in bytes, uploads included. A larger one is 413."""
    max_buffered_bytes: int = Field(default=128 * 1024 * 1024, gt=0)
    """Bytes of memory that request bodies share: half for bytes that have arrived, half for large JSON bodies during
    validation. A key gets at most what it leaves free; a body without memory for 10 s is 503.
    """
    fetch_media: bool = False
    """Fetch the http(s) URLs of images in chat messages, from public addresses only. Off: such URLs are refused."""
    fetch_max_bytes: int = Field(default=20 * 1024 * 1024, gt=0)
    """Largest file in bytes behind one such URL."""
    fetch_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds for one such URL, redirects included."""
    fetch_private_hosts: str = ""
    """`host` or `host:port`, separated by commas, that may be fetched although their addresses are private."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds in which a request's body must arrive. Large bodies get one more second per 64 KiB."""
    queue_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that a request may wait for a free worker."""
    first_token_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds from the start of an attempt to its first byte."""
    idle_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds between two bytes of an answer."""
    total_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds from the start of an attempt to its end."""
    load_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds for a backend to load a model, if it reports that it does. The other limits begin afterwards."""
    media_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that replace the first-token and idle limits for images, audio and model jobs, if longer."""
    pull_timeout_s: float = Field(default=21_600.0, gt=0)
    """Seconds that replace the total limit for pulling a model, if longer."""
    public_url: str = ""
    """URL at which callers reach the gateway, such as https://nexus.example, for results by URL. Empty: taken from
    each request.
    """
    result_url_ttl_s: float = Field(default=3600.0, ge=1)
    """Seconds for which a result by URL can be fetched."""
    max_blob_bytes: int = Field(default=4 * 1024**3, ge=1024 * 1024)
    """Bytes of uploads and large results on NATS's disk. Keep it below the disk's free space."""
    queue_comment_after_s: float = Field(default=10.0, gt=0)
    """Seconds after which a waiting stream gets comments with its queue position."""
    max_queued_jobs: int = Field(default=100_000, ge=1)
    """Jobs in all queues, running jobs included; and as many in all backlogs. Above it, requests are 429."""
    max_queued_per_model: int = Field(default=10_000, ge=1)
    """Waiting jobs of one team per capability, lane and model. Above it, requests are 429."""
    max_queue_bytes: int = Field(default=4 * 1024**3, ge=1024 * 1024)
    """Bytes of waiting jobs on NATS's disk, half of them in queues, half in backlogs. Keep it below the disk's free space."""
    max_queues: int = Field(default=12_000, ge=10)
    """Queues in NATS at the same time. One is made per capability, lane and model at its first use, and takes about
    50 KB of NATS's memory.
    """
    queue_grace_s: float = Field(default=60.0, ge=1)
    """Seconds without a live worker after which an empty queue of a model is deleted."""
    team_lanes: str = "default,flex"
    """Lanes that a team may use unless it has its own limit, separated by commas: `priority`, `default`, `flex`."""
    team_keys_file: str = ""
    """JSON file with keys of teams: what is stored of these teams' requests, answers and files is encrypted. Use the same file at all
    gateways; they read it when they start. Empty: no team has a key.
    """
    team_requests_per_minute: int = Field(default=0, ge=0)
    """Requests per minute of a team without its own limit. 0: no limit."""
    team_tokens_per_minute: int = Field(default=0, ge=0)
    """Tokens per minute of a team without its own limit. 0: no limit."""
    team_max_open: int = Field(default=1024, ge=1)
    """Requests that a team without its own limit may have open at each gateway process."""
    team_max_queued: int = Field(default=0, ge=0)
    """Waiting jobs of a team without its own limit. 0: half of `MAX_QUEUED_PER_MODEL`."""
    team_max_running: int = Field(default=0, ge=0)
    """Running jobs of a team without its own limit. 0: no limit."""
    team_max_stored_bytes: int = Field(default=0, ge=0)
    """Bytes of files of a team without its own limit. 0: a quarter of `MAX_BLOB_BYTES`."""
    team_max_pending_bytes: int = Field(default=0, ge=0)
    """Bytes of request bodies over 512 KiB that may be stored for requests and jobs of a team without its own limit. 0: a quarter of
    `MAX_BLOB_BYTES`.
    """
    team_max_result_bytes: int = Field(default=0, ge=0)
    """Bytes of each kind of stored results of a team without its own limit: jobs, URLs, responses, unfinished batches. Above it, its
    oldest are deleted, and lines of batches fail. 0: a quarter of
    `MAX_RESULT_BYTES`.
    """
    team_max_batches: int = Field(default=64, ge=1)
    """Unfinished batches of a team without its own limit."""
    team_max_webhooks: int = Field(default=32, ge=1)
    """Webhooks of a team without its own limit that each gateway process sends at the same time."""
    stream_replicas: int = Field(default=1, ge=1, le=5)
    """Replicas of the streams in a NATS cluster: 1, 3 or 5."""
    job_keep_s: float = Field(default=604_800.0, ge=60)
    """Seconds for which jobs' records and results are stored, counted from their submission."""
    events_keep_s: float = Field(default=86_400.0, ge=60)
    """Seconds for which jobs' events are stored, for callers that resume a stream."""
    job_queue_timeout_s: float = Field(default=86_400.0, gt=0)
    """Seconds that a job may wait for a worker before it expires. `QUEUE_TIMEOUT_S` applies to callers that wait on
    a connection.
    """
    response_keep_s: float = Field(default=2_592_000.0, ge=60)
    """Seconds for which responses are stored that were retrieved at least once. Others are stored as long as their
    jobs.
    """
    responses_other_tools: Literal["ignore", "refuse"] = "ignore"
    """Tools in `/v1/responses` that are no functions (`web_search`, `custom`, …), which Nexus cannot run: `ignore`
    leaves them out, `refuse` answers 400.
    """
    idempotency_keep_s: float = Field(default=86_400.0, ge=60)
    """Seconds for which an `Idempotency-Key` is stored."""
    dead_letters_keep_s: float = Field(default=2_592_000.0, ge=60)
    """Seconds for which dead letters are stored."""
    max_event_bytes: int = Field(default=2 * 1024**3, ge=1024 * 1024)
    """Bytes of jobs' events on NATS's disk. The oldest are dropped first."""
    max_result_bytes: int = Field(default=2 * 1024**3, ge=1024 * 1024)
    """Bytes of results of up to 512 KiB each on NATS's disk. The oldest are dropped first. Larger results count
    toward `MAX_BLOB_BYTES`.
    """
    max_file_bytes: int = Field(default=512 * 1024**2, gt=0)
    """Largest uploaded file in bytes. A larger one is 413."""
    file_keep_s: float = Field(default=2_592_000.0, ge=3600)
    """Longest time in seconds for which files are stored."""
    batch_window: int = Field(default=256, ge=1, le=10_000)
    """Lines of one batch that are queued or running at the same time."""
    ledger_url: SecretStr = SecretStr("")
    """Database of the usage ledger and the audit log: `sqlite:////path/to/file`, or
    `postgresql://user:password@host:5432/database`. Use the same value in all gateways. Empty: neither is recorded.
    """
    ledger_password_file: str = ""
    """File with PostgreSQL's password, if `LEDGER_URL` does not contain it. It is read at each connection."""
    ledger_prices_file: str = ""
    """TOML or JSON file with the prices of models. It is read again when it changes. Empty: usage has no cost."""
    ledger_keep_s: float = Field(default=34_560_000.0, ge=86_400)
    """Seconds for which the ledger stores single requests. Its hourly sums are never deleted."""
    usage_journal_dir: str = ""
    """Folder in which a gateway writes usage and audit events down before an answer ends, so that nothing is missing
    after a kill. Empty: those of the last tenth of a second are lost when a gateway is killed.
    """
    max_usage_bytes: int = Field(default=512 * 1024**2, ge=1024 * 1024)
    """Bytes of usage on NATS's disk that the ledger's database has not stored yet: about 220 per request."""
    oidc_issuer: str = ""
    """URL of the OpenID Connect provider with which people sign in, exactly as it names itself, such as
    https://login.example.com/realms/main. It needs `PUBLIC_URL`. Empty: people sign in with API keys alone.
    """
    oidc_client_id: str = ""
    """Id of Nexus at the provider. Register `PUBLIC_URL` + `/auth/callback` as its redirect URI."""
    oidc_client_secret: SecretStr | None = None
    """Secret of Nexus at the provider. Empty for a public client."""
    oidc_client_secret_file: str = ""
    """File with that secret. It is read at each sign-in, so a changed secret needs no restart."""
    oidc_scopes: str = "openid profile email"
    """Scopes that Nexus asks for. Some providers name groups only with a scope `groups`."""
    oidc_groups_claims: str = "groups"
    """Claims that hold a person's groups, separated by commas. `realm_access.roles` is a claim inside another one.
    `email` counts only where the provider has verified it.
    """
    oidc_roles: str = ""
    """Roles by group: `GROUP=ROLE`, separated by commas. The first rule that matches holds. Roles are `viewer`,
    `member`, `operator` and `admin`. `*` in a group stands for any text, and `*` alone for everybody whom the
    provider lets in. A rule with a comma in its group stands in double quotes. People without a role cannot sign in.
    """
    oidc_teams: str = ""
    """Teams by group, in the same form: `GROUP=TEAM`. `*` in the team is the text that `*` in the group stands for.
    People without a team have one of their own.
    """
    oidc_name: str = ""
    """Name of the provider on the sign-in page. Empty: the host in `OIDC_ISSUER`."""
    oidc_tls_ca: str = ""
    """PEM file of the authority that signed the provider's certificate. Empty: the authorities that the system
    trusts.
    """
    session_idle_s: float = Field(default=3600.0, ge=60)
    """Seconds without a request after which the session of a person ends."""
    session_max_s: float = Field(default=43_200.0, ge=60)
    """Seconds after which a session ends in any case. Changed groups count from the next sign-in on."""
    audit_keep_s: float = Field(default=34_560_000.0, ge=86_400)
    """Seconds for which the ledger's database stores the audit log."""
    max_audit_bytes: int = Field(default=256 * 1024**2, ge=1024 * 1024)
    """Bytes of audit events on NATS's disk that the database has not stored yet: about 350 per event."""
    webhook_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds for one attempt to deliver a webhook."""
    webhook_retries_s: str = "5,300,1800,7200,18000,36000,50400,72000,86400"
    """Seconds between the attempts to deliver a webhook, separated by commas. There is one more attempt than delays.
    The default is the schedule of Standard Webhooks.
    """
    webhook_private_hosts: str = ""
    """`host` or `host:port`, separated by commas, that webhooks may name although their addresses are private."""
    cors_origins: str = "*"
    """Origins that browsers may call from, separated by commas. `*` for all."""

    @property
    def public_names(self) -> frozenset[str]:
        """The names in `public_routes`."""
        return frozenset(name.strip() for name in self.public_routes.split(",") if name.strip())

    @field_validator("public_routes")
    @classmethod
    def _routes(cls, text: str) -> str:
        for name in text.split(","):
            if name.strip() not in PUBLIC_ROUTES:
                raise ValueError(f"contains '{name.strip()}'; allowed are {', '.join(sorted(PUBLIC_ROUTES - {''}))}")
        return text

    @property
    def team_lane_names(self) -> tuple[LaneName, ...]:
        """The names in `team_lanes`."""
        return LANE_NAMES.validate_python([name.strip() for name in self.team_lanes.split(",") if name.strip()])

    @field_validator("team_lanes")
    @classmethod
    def _lanes(cls, text: str) -> str:
        LANE_NAMES.validate_python([name.strip() for name in text.split(",") if name.strip()])
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
    """Kind of inference server. `nexus worker --backend ?` lists them."""
    worker_backend_url: str = ""
    """URL of the inference server."""
    worker_backend_key: SecretStr | None = None
    """API key of the inference server, if it requires one."""
    worker_backend_options: str = ""
    """Options of the adapter: `NAME=value,NAME=value`. Put a value with a comma into double quotes."""
    worker_unsupported_parameters: Literal["adapt", "refuse"] = "adapt"
    """Parameters that a model's server lacks (`n`, `tool_choice`, …): `adapt` uses the nearest equivalent and names
    it in `x-nexus-adapted`, `refuse` answers 400. An alias may override it.
    """
    worker_models: str = ""
    """Models to serve, separated by commas. Empty: all that the server has."""
    worker_concurrency: int = Field(default=0, ge=0)
    """Jobs that run at the same time. 0: as many as the server reports, or the adapter's default."""
    worker_name: str = ""
    """Id of the worker. Empty: made from host, backend and a random part."""
    worker_lease_s: int = Field(default=10, ge=2)
    """Seconds after which a dead worker disappears from the registry."""
    worker_drain_s: float = Field(default=25.0, ge=0)
    """Seconds after SIGTERM in which running jobs may finish. Then they return to the queue."""
    worker_health_interval_s: float = Field(default=5.0, gt=0)
    """Seconds between two health checks of the inference server."""
    worker_swap_patience_s: float = Field(default=10.0, ge=0)
    """Seconds for which the jobs of one model may continue while a job of another one waits, if the server cannot
    hold both models.
    """
    worker_observability_host: str = "127.0.0.1"
    """Address that the worker's own `/metrics`, `/health` and `/readyz` listen on."""
    worker_observability_port: int = Field(default=0, ge=0, le=65535)
    """Port of those routes. 0: none."""

    @property
    def host(self) -> str:
        """This machine's name."""
        return socket.gethostname()
