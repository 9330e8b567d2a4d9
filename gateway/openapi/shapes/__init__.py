"""Describe the bodies of answers, for the OpenAPI document alone: no route validates or serializes with these models.

A field without a default is in every answer. Answers of inference servers may hold more fields than their model names.
"""
