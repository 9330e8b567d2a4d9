"""Builders of descriptors: the parameters of each endpoint as JSON Schema, for adapters to narrow, to extend and to leave out."""
