"""The OpenAPI document: the parameters, bodies, responses and errors of every route."""

from gateway.openapi.document import ApiDocument

__all__ = ["ApiDocument"]
