"""The protocols between gateways and workers, and their implementation on NATS JetStream."""
