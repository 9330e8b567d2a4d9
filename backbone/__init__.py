"""Communication and storage: the bus (NATS), the registry (etcd), the store (Redis), and helpers that gateways and workers
share.
"""
