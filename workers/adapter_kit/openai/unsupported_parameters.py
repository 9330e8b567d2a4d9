"""Parameters of text requests that an OpenAI-style server lacks, and the plan for a request that has them.

The operator names them (the option `lacks`), or a probe of the worker's own finds them. Before the first request with `n` above 1
the worker requests two choices of one token: many servers ignore `n`, and a stream shows that only at its end. For the other
parameters, an error that names the parameter raises the suspicion. The answer itself shows whether a tool call that `tool_choice`
requires is missing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from functools import partial

from workers.adapter_kit.openai.client import JSON, OpenAIClient, mentions
from workers.adapter_kit.openai.feature_probes import CHAT_PATH, lacks_parameter
from workers.adapter_kit.request_fields import parse_json_object, requested_choices
from workers.adapter_kit.text.adaptations import (
    PARALLEL_TOOL_CALLS,
    TOOL_CHOICE,
    AdaptationPlan,
    N,
    has_effect,
    has_no_effect,
    plan_adaptations,
)
from workers.adapter_kit.text.adapted_text import SendRequest, execute_plan
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable, Chunk, Output, Task

PARAMETERS = frozenset({N, "best_of", "logit_bias", PARALLEL_TOOL_CALLS, TOOL_CHOICE, "verbosity", "store"})


def parse_lacks_option(text: str) -> frozenset[str]:
    """Return the parameters that the option `lacks` names. Raises ValueError for others."""
    found = frozenset(part.strip() for part in text.split("+") if part.strip())
    unknown = ", ".join(sorted(found - PARAMETERS))
    if unknown:
        raise ValueError(
            f"the option lacks names unknown parameters: {unknown}; choose from {', '.join(sorted(PARAMETERS))}"
        )
    return found


async def plan_text(api: OpenAIClient, path: str, task: Task, body: JSON) -> AdaptationPlan | None:
    """Return the plan for a request, by what is known of the model; None where the request can be sent unchanged."""
    if requested_choices(body) > 1 and N not in api.declared_lacks:
        await _confirm(api, path, task.model, N)
    return _plan(api, path, task)


async def plan_after_refusal(api: OpenAIClient, path: str, task: Task, error: BackendError) -> AdaptationPlan | None:
    """Return the plan for a refused request, where a probe shows that the server lacks a parameter that the error names; else None."""
    if isinstance(error, BackendUnavailable):
        return None
    body = parse_json_object(task.body)
    sent = [name for name in PARAMETERS if name != N and (has_effect(body, name) or has_no_effect(body, name))]
    suspects = [name for name in sent if mentions(error, name)]
    found = [name for name in suspects if await _confirm(api, path, task.model, name)]
    return _plan(api, path, task) if found else None


async def execute_and_replan(
    api: OpenAIClient,
    path: str,
    task: Task,
    plan: AdaptationPlan,
    ask: SendRequest,
) -> AsyncGenerator[Output]:
    """Serve a task by its plan; where the server refuses it and a probe shows why, by a new plan."""
    has_output = False
    try:
        async with aclosing(execute_plan(task, plan, ask)) as outputs:
            async for output in outputs:
                has_output = has_output or (isinstance(output, Chunk) and bool(output.data))
                yield output
        return
    except BackendRefused as error:
        new_plan = None if has_output else await plan_after_refusal(api, path, task, error)
        if new_plan is None or new_plan == plan:
            raise
    async with aclosing(execute_plan(task, new_plan, ask)) as outputs:
        async for output in outputs:
            yield output


def _plan(api: OpenAIClient, path: str, task: Task) -> AdaptationPlan | None:
    lacks = api.declared_lacks | frozenset(_known_lacks(api, path, task.model))
    chat = path == CHAT_PATH
    return plan_adaptations(
        parse_json_object(task.body), lacks, model=task.public_model, adapt=task.adapt, chat=chat, strict=True
    )


def _known_lacks(api: OpenAIClient, path: str, model: str) -> Iterator[str]:
    for name in PARAMETERS:
        if api.limitations.lacks(model, _feature_name(name, path)):
            yield name


async def _confirm(api: OpenAIClient, path: str, model: str, name: str) -> bool:
    probe = partial(lacks_parameter, api, path, model, name)
    return await api.limitations.confirm(model, _feature_name(name, path), probe)


def _feature_name(name: str, path: str) -> str:
    return name if path == CHAT_PATH else f"{name} of completions"
