"""How things travel: bus (NATS), registry (etcd), store (Redis), and what both sides share."""
