"""Parameters of text requests that a server lacks, refused or replaced by the nearest equivalent. Pure.

An adapter names the parameters that a model's server lacks. The worker's or the alias's policy (`Task.adapt`) decides:

- refuse: 400 `unsupported_parameter` with the parameter, the model and what to do;
- adapt: the nearest equivalent, and the parameter's name in the header `x-nexus-adapted`. No parameter is ignored silently.

`docs/reference/parameters.md` has the table, and a test holds it against this module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from workers.adapter_kit.request_fields import JSON
from workers.backends.base import BackendRefused

MAX_CHOICES = 16
"""The largest `n` where each choice takes a request of its own."""
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
"""Why a server does not honor a parameter, and what the caller can do."""
NO_EFFECT_VALUES: Mapping[str, tuple[Any, ...]] = {
    N: (1,),
    "best_of": (1,),
    "logit_bias": ({},),
    PARALLEL_TOOL_CALLS: (True,),
    TOOL_CHOICE: ("auto", "none"),
    "verbosity": ("medium",),
    "store": (False,),
}
"""Values that change nothing in the answer."""
DROPPED_PARAMETERS = frozenset({"best_of", "logit_bias", "logprobs", "verbosity", "store"})
"""Parameters without an equivalent: adapting removes them."""
ADAPTABLE_PARAMETERS = frozenset(UNSUPPORTED_HINTS)
"""A request that has none of these needs no plan."""


@dataclass(frozen=True, slots=True)
class AdaptationPlan:
    """The requests to the server that serve one request of a caller."""

    body: JSON
    """The body of each request to the server, in OpenAI's form."""
    adapted: tuple[str, ...] = ()
    requests: int = 1
    """How many requests: one for each choice."""
    forced: bool = False
    """Each choice must hold a tool call."""
    fallback: JSON | None = None
    """The body of a second request, which asks for the arguments as JSON, where a choice holds no tool call; None: that is an error."""
    tools: tuple[str, ...] = ()
    """The names of the functions that `fallback` offers."""
    unsent_parameters: frozenset[str] = frozenset()
    """Parameters of `body` that the adapter handles itself and must not send."""


def plan_adaptations(
    body: JSON, lacks: Collection[str], *, model: str, adapt: bool, chat: bool, strict: bool = False
) -> AdaptationPlan | None:
    """Return the plan to serve `body` on a server that lacks these parameters; None where nothing needs adapting or checking.

    `strict`: the server refuses these parameters even with values that change nothing; such parameters are removed.
    Raises BackendRefused for a parameter that the policy refuses, and for values that are invalid.
    """
    effective = [name for name in UNSUPPORTED_HINTS if name in lacks and has_effect(body, name)]
    if effective and not adapt:
        raise unsupported_parameter(effective[0], model)
    ineffective = [name for name in UNSUPPORTED_HINTS if name in lacks and has_no_effect(body, name)] if strict else []
    tools, forced = _allowed_tools(body) if chat and _handles_tool_choice(body, lacks) else ([], False)
    if not effective and not forced and not ineffective:
        return None
    new = {name: value for name, value in body.items() if name not in ineffective}
    if TOOL_CHOICE in ineffective and body[TOOL_CHOICE] == "none":
        new.pop("tools", None)
    requests = 1
    for name in effective:
        if name == N:
            requests = _require_valid_n(new.pop(N), model)
        elif name in DROPPED_PARAMETERS:
            del new[name]
        elif name == TOOL_CHOICE:
            if not forced and not isinstance(new[TOOL_CHOICE], dict):
                raise BackendRefused(
                    "tool_choice must be 'none', 'auto', 'required', or an object that names functions",
                    param=TOOL_CHOICE,
                )
            del new[TOOL_CHOICE]
            new["tools"] = tools
    fallback = _json_call_request(new, tools) if forced and adapt else None
    names = tuple(str(tool["function"]["name"]) for tool in tools)
    return AdaptationPlan(
        new, tuple(effective), requests, forced, fallback, names, frozenset(effective) & {PARALLEL_TOOL_CALLS}
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
    """Return whether this parameter changes the answer to a request."""
    value = body.get(name)
    if value is None or has_no_effect(body, name):
        return False
    if name == "logprobs":
        return value is not False
    return name not in (PARALLEL_TOOL_CALLS, TOOL_CHOICE) or bool(body.get("tools"))


def has_no_effect(body: JSON, name: str) -> bool:
    """Return whether a request has this parameter with a value that changes nothing, and may have it."""
    if body.get(name) is None:
        return name in body
    return body[name] in NO_EFFECT_VALUES.get(name, ()) and (
        name not in (PARALLEL_TOOL_CALLS, TOOL_CHOICE) or bool(body.get("tools"))
    )


def _require_valid_n(n: Any, model: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CHOICES:
        raise BackendRefused(
            f"n may be 1 to {MAX_CHOICES} for the model '{model[:100]}', which makes each choice by a request of its own",
            param=N,
        )
    return n


def _handles_tool_choice(body: JSON, lacks: Collection[str]) -> bool:
    """Return whether `tool_choice` is handled here. A server that has it handles tools of other types itself."""
    given = body.get("tools")
    others = isinstance(given, list) and any(isinstance(tool, dict) and not _name(tool) for tool in given)
    return body.get(TOOL_CHOICE) is not None and (TOOL_CHOICE in lacks or not others)


def _allowed_tools(body: JSON) -> tuple[list[JSON], bool]:
    """Return the tools that `tool_choice` allows, and whether one of them must be called."""
    given = body.get("tools")
    tools = [tool for tool in given if isinstance(tool, dict)] if isinstance(given, list) else []
    choice = body[TOOL_CHOICE]
    if choice in ("required", "any"):  # Mistral writes "any"
        return _require_functions(tools), bool(tools)
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
        raise BackendRefused(f"tool_choice names {missing}, which tools does not contain", param=TOOL_CHOICE)
    return _require_functions(left), forced


def _require_functions(tools: list[JSON]) -> list[JSON]:
    """Return the tools, which must all be functions. Raises BackendRefused for tools of other types."""
    if not all(_name(tool) for tool in tools):
        raise BackendRefused("tool_choice can require tools of the type function only", param=TOOL_CHOICE)
    return tools


def _name(tool: JSON) -> str:
    function = tool.get("function")
    return str(function.get("name") or "") if isinstance(function, dict) else ""


def _json_call_request(body: JSON, tools: list[JSON]) -> JSON:
    """Return the request for the call as JSON, with the schema of the one tool or of any of several."""
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
    instruction = f"You must call a function now. There is:\n{described}\nAnswer with {form} and nothing else."
    left_out = ("tools", TOOL_CHOICE, PARALLEL_TOOL_CALLS, "response_format")
    new = {name: value for name, value in body.items() if name not in left_out}
    new["messages"] = _with_instruction(new.get("messages"), instruction)
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


def _with_instruction(messages: Any, instruction: str) -> Any:
    """Add an instruction to the system message: chat templates want one such message, first."""
    if not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [first | {"content": f"{first['content']}\n\n{instruction}"}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]
