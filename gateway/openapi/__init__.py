"""The OpenAPI document: what each route takes, answers and refuses, and the page that shows it."""

from gateway.openapi.document import ApiDocument

__all__ = ["ApiDocument"]
