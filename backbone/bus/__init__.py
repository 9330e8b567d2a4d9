"""NATS JetStream, and a memory implementation of the same seam."""
