"""Build the parameters of chat and text completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.descriptors import JSON, EndpointDescriptor
from schemas.parameters.fields import advanced, body, choice, flag, integer, prompt, seed, slider, text

MAX_CHOICES = 128
PICTURES = ("image/png", "image/jpeg", "image/webp", "image/gif")
EFFORTS = ("none", "minimal", "low", "medium", "high")


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What a model of text can do, as far as its server says. True where it does not say, except for pictures and reasoning."""

    context_length: int | None = None
    vision: bool = False
    """The model reads pictures."""
    tools: bool = True
    reasoning: bool = False
    """The model reasons, and how much can be chosen."""
    structured: bool = True
    """The answer can be bound to a JSON Schema."""
    lacks: frozenset[str] = frozenset()
    """Parameters that the server lacks. They are adapted or refused, so a form does not offer them."""


def chat(features: TextFeatures, extra: Mapping[str, JSON] | None = None) -> EndpointDescriptor:
    """Return the parameters of `/v1/chat/completions`. `extra`: those that only this server has."""
    fields: dict[str, JSON] = {"messages": _messages(features)}
    fields |= {"max_completion_tokens": _max_tokens(features)} | _sampling()
    if features.reasoning:
        fields["reasoning_effort"] = choice(
            "Reasoning effort", EFFORTS, "How much the model reasons before it answers."
        )
    if features.structured:
        fields["response_format"] = _json(
            "Response format", '`{"type": "json_object"}`, or a JSON Schema that the answer follows.', "object"
        )
    if features.tools:
        fields["tools"] = _json("Tools", "The functions that the model may call.", "array")
        fields["tool_choice"] = advanced(
            {
                "type": ["string", "object"],
                "title": "Tool choice",
                "description": "`auto`, `none`, `required`, or one function.",
            }
        )
        fields["parallel_tool_calls"] = advanced(flag("Parallel tool calls", default=True))
    fields["logprobs"] = advanced(flag("Log probabilities"))
    fields["stream"] = advanced(flag("Stream", "Send the answer while it is written."))
    fields |= extra or {}
    example: JSON = {"messages": [{"role": "user", "content": "Say hello in one sentence."}]}
    example |= {} if "max_completion_tokens" in features.lacks else {"max_completion_tokens": 64}
    return EndpointDescriptor(parameters=body(_without(fields, features), ("messages",)), example=example)


def completions(features: TextFeatures, extra: Mapping[str, JSON] | None = None) -> EndpointDescriptor:
    """Return the parameters of `/v1/completions`. `extra`: those that only this server has."""
    fields: dict[str, JSON] = {"prompt": prompt(), "max_tokens": _max_tokens(features)} | _sampling()
    fields["best_of"] = advanced(
        integer("Best of", "Choices to make, of which the best are returned.", least=1, most=MAX_CHOICES)
    )
    fields["stream"] = advanced(flag("Stream", "Send the answer while it is written."))
    fields |= extra or {}
    example: JSON = {"prompt": "Once upon a time"}
    example |= {} if "max_tokens" in features.lacks else {"max_tokens": 32}
    return EndpointDescriptor(parameters=body(_without(fields, features), ("prompt",)), example=example)


def _messages(features: TextFeatures) -> JSON:
    message: JSON = {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": ["string", "array", "null"]},
        },
        "required": ["role"],
    }
    schema: JSON = {"type": "array", "title": "Messages", "items": message, "minItems": 1, "x-nexus-widget": "messages"}
    return schema | ({"x-nexus-media": list(PICTURES)} if features.vision else {})


def _max_tokens(features: TextFeatures) -> JSON:
    return integer(
        "Longest answer",
        "The answer ends after so many tokens.",
        least=1,
        most=features.context_length,
        **{"x-nexus-unit": "tokens"},
    )


def _sampling() -> dict[str, JSON]:
    several = integer("Choices", "How many answers to write.", least=1, most=MAX_CHOICES, default=1)
    return {
        "temperature": slider(
            "Temperature",
            "0 takes the most probable token; higher values are more random.",
            least=0.0,
            most=2.0,
            step=0.05,
        ),
        "top_p": slider(
            "Top P", "Only the most probable tokens with this sum of probabilities.", least=0.0, most=1.0, step=0.01
        ),
        "stop": advanced(
            {"type": ["string", "array"], "title": "Stop", "description": "Texts before which the answer ends."}
        ),
        "seed": advanced(seed("The same seed may give the same answer.", least=-(2**63), most=2**63 - 1)),
        "frequency_penalty": advanced(slider("Frequency penalty", least=-2.0, most=2.0, step=0.1)),
        "presence_penalty": advanced(slider("Presence penalty", least=-2.0, most=2.0, step=0.1)),
        "n": advanced(several),
        "logit_bias": _json("Logit bias", "A bias from -100 to 100 by token id.", "object"),
        "user": advanced(text("User", "The end user, for the server's own records.")),
    }


def _json(title: str, description: str, kind: str) -> JSON:
    return advanced({"type": kind, "title": title, "description": description, "x-nexus-widget": "json"})


def _without(fields: Mapping[str, JSON], features: TextFeatures) -> dict[str, JSON]:
    return {name: schema for name, schema in fields.items() if name not in features.lacks}
