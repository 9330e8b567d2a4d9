"""Models of response bodies, used only for the OpenAPI document: no route validates or serializes with them.

A field without a default is part of every response. Inference servers may return more fields than these models name.
"""
