"""Parameters of text requests that a server lacks, refused or replaced by the nearest equivalent: pure.

An adapter says what a model's server lacks; the policy is the worker's or the alias's (`Task.adapt`) and the same everywhere:

- refuse: 400 `unsupported_parameter` with the parameter, the model and what to do;
- adapt: the nearest equivalent, named to the caller in `x-nexus-adapted`. Nothing is ignored without a word.

`docs/reference/parameters.md` has the table, and a test holds it against this module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from workers.adapter_kit.request_fields import JSON
from workers.backends.base import BackendRefused

MAX_CHOICES = 16
"""Choices that are made by requests of their own, one after another."""
TOOL_CHOICE, PARALLEL_TOOL_CALLS, N = "tool_choice", "parallel_tool_calls", "n"
UNSUPPORTED_PARAMETER = "unsupported_parameter"
UNSUPPORTED_HINTS: Mapping[str, tuple[str, str]] = {
    N: ("its server gives one choice a request", "Send several requests"),
    "best_of": ("its server gives one choice a request", "Send several requests and choose among the answers"),
    TOOL_CHOICE: ("its server lets the model choose its tools", "Leave tool_choice out, or send 'auto' or 'none'"),
    PARALLEL_TOOL_CALLS: (
        "its server cannot keep the model from calling several tools at once",
        "Leave parallel_tool_calls out",
    ),
    "logit_bias": ("its server has no logit_bias", "Leave logit_bias out"),
    "logprobs": ("its server gives logprobs for chat alone", "Use /v1/chat/completions, or leave logprobs out"),
    "verbosity": ("its server has no verbosity", "Say in the prompt how long the answer is to be"),
    "store": ("chat completions are not stored here", "Leave store out, or use /v1/responses"),
}
"""Why a server does not honor a parameter, and what to do."""
NO_EFFECT_VALUES: Mapping[str, tuple[Any, ...]] = {
    N: (1,),
    "best_of": (1,),
    "logit_bias": ({},),
    PARALLEL_TOOL_CALLS: (True,),
    TOOL_CHOICE: ("auto", "none"),
    "verbosity": ("medium",),
    "store": (False,),
}
"""Values that ask for nothing in particular."""
DROPPED_PARAMETERS = frozenset({"best_of", "logit_bias", "logprobs", "verbosity", "store"})
"""Parameters without an equivalent: adapting leaves them out."""
ADAPTABLE_PARAMETERS = frozenset(UNSUPPORTED_HINTS)
"""A request without any of these needs no plan."""


@dataclass(frozen=True, slots=True)
class AdaptationPlan:
    """How one request of a caller becomes requests to the server."""

    body: JSON
    """Of each request to the server, in OpenAI's terms."""
    adapted: tuple[str, ...] = ()
    requests: int = 1
    """One for each choice."""
    forced: bool = False
    """Each choice must hold a tool call."""
    fallback: JSON | None = None
    """The request for a choice whose answer holds no tool call: the arguments as JSON by their schema. None: that is an error."""
    tools: tuple[str, ...] = ()
    """The functions that `fallback` is about."""
    unsent_parameters: frozenset[str] = frozenset()
    """Parameters of `body` that the server must not see: the adapter sees to them."""


def plan_adaptations(
    body: JSON, lacks: Collection[str], *, model: str, adapt: bool, chat: bool, strict: bool = False
) -> AdaptationPlan | None:
    """Return how to serve `body` on a server that lacks these parameters; None where there is nothing to adapt or to check.

    `strict`: it refuses them also where they ask for nothing; they are left out, and nothing is adapted. Raises BackendRefused for what the policy refuses, and for what makes no sense.
    """
    asked = [name for name in UNSUPPORTED_HINTS if name in lacks and has_effect(body, name)]
    if asked and not adapt:
        raise unsupported_parameter(asked[0], model)
    idle = [name for name in UNSUPPORTED_HINTS if name in lacks and has_no_effect(body, name)] if strict else []
    tools, forced = _chosen_tools(body) if chat and _is_chosen(body, lacks) else ([], False)
    if not asked and not forced and not idle:
        return None
    new = {name: value for name, value in body.items() if name not in idle}
    if TOOL_CHOICE in idle and body[TOOL_CHOICE] == "none":
        new.pop("tools", None)
    requests = 1
    for name in asked:
        if name == N:
            requests = _bounded(new.pop(N), model)
        elif name in DROPPED_PARAMETERS:
            del new[name]
        elif name == TOOL_CHOICE:
            if not forced and not isinstance(new[TOOL_CHOICE], dict):
                raise BackendRefused(
                    "tool_choice is 'none', 'auto', 'required', or an object that names functions", param=TOOL_CHOICE
                )
            del new[TOOL_CHOICE]
            new["tools"] = tools
    fallback = _constrained(new, tools) if forced and adapt else None
    names = tuple(str(tool["function"]["name"]) for tool in tools)
    return AdaptationPlan(
        new, tuple(asked), requests, forced, fallback, names, frozenset(asked) & {PARALLEL_TOOL_CALLS}
    )


def unsupported_parameter(name: str, model: str) -> BackendRefused:
    """Return the error for a parameter that the policy refuses."""
    why, instead = UNSUPPORTED_HINTS[name]
    return BackendRefused(
        f"The model '{model[:100]}' cannot honor '{name}': {why}. {instead}, or have the operator set its worker's or its"
        " alias's unsupported parameters to 'adapt'.",
        param=name,
        code=UNSUPPORTED_PARAMETER,
    )


def has_effect(body: JSON, name: str) -> bool:
    """Return whether a request asks for something by this parameter."""
    value = body.get(name)
    if value is None or has_no_effect(body, name):
        return False
    if name == "logprobs":
        return value is not False
    return name not in (PARALLEL_TOOL_CALLS, TOOL_CHOICE) or bool(body.get("tools"))


def has_no_effect(body: JSON, name: str) -> bool:
    """Return whether a parameter was sent with a value that asks for nothing, in a request in which it may stand."""
    if body.get(name) is None:
        return name in body
    return body[name] in NO_EFFECT_VALUES.get(name, ()) and (
        name not in (PARALLEL_TOOL_CALLS, TOOL_CHOICE) or bool(body.get("tools"))
    )


def _bounded(n: Any, model: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
        raise BackendRefused(
            f"n may be 1 to {MAX_CHOICES} for the model '{model[:100]}', which makes each choice by a request of its own",
            param=N,
        )
    return n


def _is_chosen(body: JSON, lacks: Collection[str]) -> bool:
    """Whether tool_choice is seen to here. Tools of other types are the server's business, where it has tool_choice."""
    given = body.get("tools")
    others = isinstance(given, list) and any(isinstance(tool, dict) and not _name(tool) for tool in given)
    return body.get(TOOL_CHOICE) is not None and (TOOL_CHOICE in lacks or not others)


def _chosen_tools(body: JSON) -> tuple[list[JSON], bool]:
    """The tools that `tool_choice` leaves, and whether one of them must be called."""
    given = body.get("tools")
    tools = [tool for tool in given if isinstance(tool, dict)] if isinstance(given, list) else []
    choice = body[TOOL_CHOICE]
    if choice in ("required", "any"):  # Mistral's word for it
        return _functions(tools), bool(tools)
    if not isinstance(choice, dict):
        return tools, False
    allowed = choice.get("allowed_tools")
    if choice.get("type") == "allowed_tools" and isinstance(allowed, dict):
        wanted = {_name(tool) for tool in allowed.get("tools") or () if isinstance(tool, dict)}
        forced = allowed.get("mode") == "required"
    else:
        wanted, forced = {_name(choice)}, True
    left = [tool for tool in tools if _name(tool) in wanted]
    if not left or wanted - {_name(tool) for tool in left}:
        missing = ", ".join(sorted(repr(name) for name in wanted - {_name(tool) for tool in left})) or "no tool"
        raise BackendRefused(f"tool_choice names {missing}, which is not among tools", param=TOOL_CHOICE)
    return _functions(left), forced


def _functions(tools: list[JSON]) -> list[JSON]:
    """Raises BackendRefused for tools that cannot be offered by name."""
    if not all(_name(tool) for tool in tools):
        raise BackendRefused("tool_choice can require tools of the type function only", param=TOOL_CHOICE)
    return tools


def _name(tool: JSON) -> str:
    function = tool.get("function")
    return str(function.get("name") or "") if isinstance(function, dict) else ""


def _constrained(body: JSON, tools: list[JSON]) -> JSON:
    """The request for the call as JSON, by the schema of the one tool or of any of several."""
    schemas = {_name(tool): tool["function"].get("parameters") or _NO_PARAMETERS for tool in tools}
    described = "\n".join(
        f"- {_name(tool)}: {tool['function'].get('description') or 'no description'}" for tool in tools
    )
    if len(schemas) == 1:
        [schema] = schemas.values()
        form = "the JSON object of its arguments"
    else:
        schema = _any_of(schemas)
        form = 'a JSON object {"name": …, "arguments": {…}} that says which function and with which arguments'
    said = f"You must call a function now. There is:\n{described}\nAnswer with {form} and nothing else."
    left_out = ("tools", TOOL_CHOICE, PARALLEL_TOOL_CALLS, "response_format")
    new = {name: value for name, value in body.items() if name not in left_out}
    new["messages"] = _with_instruction(new.get("messages"), said)
    new["response_format"] = {"type": "json_schema", "json_schema": {"name": "arguments", "schema": schema}}
    return new


_NO_PARAMETERS: JSON = {"type": "object", "properties": {}}


def _any_of(schemas: dict[str, JSON]) -> JSON:
    definitions: JSON = {}
    choices = []
    for name, schema in schemas.items():
        own = dict(schema)
        definitions |= own.pop("$defs", {})
        properties = {"name": {"type": "string", "enum": [name]}, "arguments": own}
        choices.append({"type": "object", "properties": properties, "required": ["name", "arguments"]})
    return {"anyOf": choices} | ({"$defs": definitions} if definitions else {})


def _with_instruction(messages: Any, said: str) -> Any:
    """Templates want the system message first, and but one of them."""
    if not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [first | {"content": f"{first['content']}\n\n{said}"}, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]
