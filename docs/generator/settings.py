"""The settings as a reference page, as `.env.example`, and as the schema of the Helm chart's values."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from backbone.settings import CommonSettings, GatewaySettings, WorkerSettings
from docs.generator.markdown import NOTICE, code, table

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / ".env.example"
CHART_SCHEMA = ROOT / "deploy" / "kubernetes" / "nexus" / "values.schema.json"
COMPOSE = "# --- Docker Compose"
"""From this line on, `.env.example` holds variables of the compose files, which tests/deploy compares with those."""
LINE_LENGTH = 120
SCALAR = ["string", "number", "boolean"]

INTRODUCTION = """
A setting is an environment variable, or a line `NAME=value` in the file `.env` of the folder where a process starts. A process
ignores what is not its own. [.env.example](../../.env.example) has the same list to copy, and the variables of the compose files.
[Tune the settings](../how-to/tune.md) says when to change one.
"""


@dataclass(frozen=True)
class Setting:
    """One setting, as its class declares it."""

    name: str
    field: FieldInfo
    description: str

    @property
    def default(self) -> str:
        """The default as an environment variable would hold it; empty for none."""
        value = self.field.get_default()
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values that it may have; empty where there are others."""
        return get_args(self.field.annotation) if get_origin(self.field.annotation) is Literal else ()

    @property
    def type(self) -> type:
        """The type of its value, `None` aside."""
        annotation = self.field.annotation
        kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        return next((kind for kind in kinds if isinstance(kind, type) and kind is not NoneType), str)

    @property
    def bounds(self) -> dict[str, float]:
        """Its limits in the words of JSON Schema."""
        found: dict[str, float] = {}
        for limit in self.field.metadata:
            if isinstance(limit, Ge):
                found["minimum"] = limit.ge  # type: ignore[assignment]
            elif isinstance(limit, Gt):
                found["exclusiveMinimum"] = limit.gt  # type: ignore[assignment]
            elif isinstance(limit, Le):
                found["maximum"] = limit.le  # type: ignore[assignment]
        return found


SECTIONS: tuple[tuple[str, type[CommonSettings]], ...] = (
    ("Every process", CommonSettings),
    ("Gateway", GatewaySettings),
    ("Worker", WorkerSettings),
)


def settings_of(kind: type[CommonSettings]) -> Iterator[Setting]:
    """Yield the settings that `kind` declares itself, in its order. Raises `TypeError` if one has no docstring."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for line, following in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        name = line.target.id
        if name not in kind.model_fields:
            continue
        if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
            raise TypeError(f"{kind.__name__}.{name} has no docstring. Write what it is in the line below it.")
        yield Setting(name.upper(), kind.model_fields[name], " ".join(str(following.value.value).split()))


def page() -> str:
    """Return docs/reference/settings.md."""
    parts = [
        "# Settings\n\n",
        NOTICE,
        INTRODUCTION,
    ]
    for title, kind in SECTIONS:
        rows = [(code(one.name), code(one.default), described(one)) for one in settings_of(kind)]
        parts += [f"\n## {title}\n\n", table(["setting", "default", "meaning"], rows)]
    return "".join(parts)


def described(setting: Setting) -> str:
    """Return the description of a setting, with its values or limits."""
    if setting.choices:
        return f"{setting.description} One of {', '.join(code(one) for one in setting.choices)}."
    return setting.description


def example() -> str:
    """Return `.env.example`: the settings, and the part about the compose files as it stands."""
    lines = [
        "# Settings of Nexus: environment variables, or a file `.env` in the folder where a process starts.",
        "# Each line shows a default; remove the '#' to change it. A process ignores what is not its own.",
        "# `nexus up` sets the addresses, ports and names of its own parts itself; all other settings apply to it too.",
        '# This part is generated from backbone/settings.py by `python -m docs.generator`, up to "Docker Compose".',
        "",
    ]
    for title, kind in SECTIONS:
        lines += [f"# --- {title} ".ljust(LINE_LENGTH, "-"), ""]
        for setting in settings_of(kind):
            text = re.sub(r"`([^` ]+)`", r"\1", described(setting))
            lines += textwrap.wrap(
                text,
                LINE_LENGTH,
                initial_indent="# ",
                subsequent_indent="# ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            lines.append(f"#{setting.name}={setting.default}")
        lines.append("")
    return "\n".join(lines) + "\n" + EXAMPLE.read_text()[EXAMPLE.read_text().index(COMPOSE) :]


def chart_schema() -> str:
    """Return the schema of the chart's values, with the settings that each `settings` may hold."""
    schema = json.loads(CHART_SCHEMA.read_text())
    of = {title: {one.name: value_schema(one) for one in settings_of(kind)} for title, kind in SECTIONS}
    schema["definitions"] = {
        "settings": values(of["Every process"] | of["Gateway"] | of["Worker"]),
        "gatewaySettings": values(of["Every process"] | of["Gateway"]),
        "workerSettings": values(of["Every process"] | of["Worker"]),
    }
    properties = schema["properties"]
    properties["settings"] = {"$ref": "#/definitions/settings"}
    properties["gateway"]["properties"]["settings"] = {"$ref": "#/definitions/gatewaySettings"}
    for owner in (properties["workers"]["items"], properties["workerDefaults"]):
        owner["properties"]["settings"] = {"$ref": "#/definitions/workerSettings"}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def values(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one `settings`: known names with their types, others for what runs beside Nexus."""
    return {
        "type": "object",
        "description": "Settings by their names in .env.example",
        "propertyNames": {"pattern": "^[A-Z][A-Z0-9_]*$"},
        "properties": properties,
        "additionalProperties": {"type": SCALAR},
    }


def value_schema(setting: Setting) -> dict[str, Any]:
    """Return the schema of one setting's value: as itself, or as the text that an environment variable holds."""
    said = {"description": setting.description}
    if setting.choices:
        return {**said, "enum": list(setting.choices)}
    if setting.type is bool:
        return {**said, "type": ["boolean", "string"]}
    if setting.type is int:
        return {**said, "type": ["integer", "string"], "pattern": "^[0-9]+$", **setting.bounds}
    if setting.type is float:
        return {**said, "type": ["number", "string"], **setting.bounds}
    assert setting.type in (str, SecretStr)
    return {**said, "type": SCALAR}
