"""Webhooks: signatures, delivery and the record of deliveries."""
