"""Communication and storage: the bus (NATS), the registry (etcd), the store (Redis), and helpers that gateways and workers
share.
"""

from backbone.optional_libraries import hide_library

# structlog loads rich for tracebacks on a terminal, which `backbone.terminal_log` writes itself.
with hide_library("rich"):
    import structlog  # noqa: F401
