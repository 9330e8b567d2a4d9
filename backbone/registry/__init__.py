"""The registry of workers, models, aliases and services in etcd."""

import os

# Set before gRPC is imported: its C library would write each failed TLS handshake to standard error, between the lines of
# JSON. `etcd.unavailable` reports it once.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
