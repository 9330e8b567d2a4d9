"""Builds the document's schemas from pydantic models, with attribute docstrings as descriptions."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

JSON = dict[str, Any]
REF = "#/components/schemas/"


class DescribedSchema(GenerateJsonSchema):
    """Adds attribute docstrings as field descriptions.

    The docstrings are read here instead of at class creation, so that no process pays for them at startup.
    """

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Return a model's JSON schema."""
        made = super().model_schema(schema)
        texts = attribute_docstrings(schema["cls"])
        for name, field in made.get("properties", {}).items():
            field.pop("title", None)  # "Finish Reason" says no more than `finish_reason`
            if name in texts:
                field.setdefault("description", texts[name])
        return made


def component_schemas(models: Iterable[type[BaseModel]]) -> JSON:
    """Return the schemas of `models` and of all models that they refer to, by component name."""
    wanted = list(dict.fromkeys(models))
    _, document = models_json_schema(
        [(model, "validation") for model in wanted],
        ref_template=REF + "{model}",
        schema_generator=DescribedSchema,
    )
    schemas: JSON = document.get("$defs", {})
    names = {name: _component_name(name, schema) for name, schema in schemas.items()}
    return {
        names[name]: _renamed(schema, names) | {"title": names[name]}  # code generators name classes by title
        for name, schema in sorted(schemas.items())
    }


def component_name(model: type[BaseModel]) -> str:
    """Return the name of a model's component: the title in its config, else its class name."""
    return model.model_config.get("title") or model.__name__


def attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring of each attribute of a model and of its base classes."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            found |= _own_docstrings(owner)
    return found


def _own_docstrings(owner: type[BaseModel]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):  # no source code is available
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, text in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found


def _component_name(name: str, schema: JSON) -> str:
    """Return the title that a model gives itself, else its name.

    Pydantic calls models that share a name `schemas__openai__chat__StreamOptions`: the component is `ChatStreamOptions` then.
    """
    parts = name.split("__")
    title: str = schema.get("title", parts[-1])
    if title != parts[-1]:
        return title
    return name if len(parts) == 1 else "".join(part[:1].upper() + part[1:] for part in parts[-2:])


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: REF + names[item.removeprefix(REF)] if key == "$ref" else _renamed(item, names)
        for key, item in value.items()
    }
