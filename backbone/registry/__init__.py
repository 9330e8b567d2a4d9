"""Who is there and what they serve, kept in etcd."""

import os

# Before gRPC is imported, which reads it then: its C library writes each failed TLS handshake to standard error, between
# the lines of JSON. `etcd.away` says it once.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
