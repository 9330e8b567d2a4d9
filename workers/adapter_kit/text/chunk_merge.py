"""Merging the pieces of a stream into one object, as OpenAI's own clients do. Pure."""

from __future__ import annotations

from typing import Any

from workers.adapter_kit.text.token_usage import final_usage

JSON = dict[str, Any]

UNSPLIT_STRINGS = frozenset({"role", "type", "id", "object", "model", "finish_reason"})
"""Strings that come complete: a repeated one must not be appended."""
SPLIT_STRINGS = frozenset(
    {"content", "text", "arguments", "input", "refusal", "transcript", "data", "thinking", "summary"}
)
"""Strings that come in pieces, which may be equal, like those whose names begin with `reasoning`. Other strings that are equal are repetitions."""
GROWING_FIELDS = frozenset({"delta", "text", "logprobs"})
"""Parts of a choice that come in pieces."""


def merge_choice(into: JSON, piece: JSON) -> None:
    """Merge a later piece of the same choice: texts grow; of any other field, the last value that is not null counts."""
    for name, value in piece.items():
        if name in GROWING_FIELDS:
            merge_objects(into, {name: value})
        elif value is not None:
            into[name] = value


def merge_objects(into: JSON, piece: JSON) -> None:
    """Merge `piece` into `into`: strings grow, lists grow (by `index`, where their items have one), objects merge.

    Of any other value, the last that is not null counts.
    """
    for name, value in piece.items():
        old = into.get(name)
        if value is None or old is None:
            if value is not None or name not in into:
                into[name] = value
        elif isinstance(old, str) and isinstance(value, str):
            into[name] = value if name in UNSPLIT_STRINGS or (old == value and not _is_split(name)) else old + value
        elif isinstance(old, dict) and isinstance(value, dict):
            merge_objects(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            _merge_lists(old, value)
        else:
            into[name] = value


def _is_split(name: str) -> bool:
    return name in SPLIT_STRINGS or name.startswith("reasoning")


def _merge_lists(into: list[Any], piece: list[Any]) -> None:
    for item in piece:
        index = item.get("index") if isinstance(item, dict) else None
        twin = (
            None
            if index is None
            else next((old for old in into if isinstance(old, dict) and old.get("index") == index), None)
        )
        if twin is None:
            into.append(item)
        else:
            merge_objects(twin, item)


def finish_choice(choice: JSON, chat: bool) -> JSON:
    """Return the choice of a complete answer that its merged chunks make."""
    if not chat:
        return {"text": "", "logprobs": None} | choice
    message = {"role": "assistant", "content": None, "refusal": None} | choice.get("delta", {})
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_without_index(call) for call in sorted(calls, key=_index)]
        message["content"] = message["content"] or None
    else:
        message.pop("tool_calls", None)
        if message["content"] is None and not message["refusal"]:
            message["content"] = ""
    rest = {name: value for name, value in choice.items() if name != "delta"}
    return {"index": 0, "message": message, "logprobs": None} | rest


def _index(call: JSON) -> int:
    return int(call.get("index", 0))


def _without_index(call: JSON) -> JSON:
    return {"type": "function"} | {name: value for name, value in call.items() if name != "index"}


def combine_usage(usages: list[JSON], n: int, choices: int) -> JSON | None:
    """Return the usage of the whole answer.

    The last usage counts, except with llama.cpp: it sends one per choice, and each counts the prompt again.
    """
    if not usages:
        return None
    if choices == 1 or len(usages) != choices:
        return final_usage(usages)
    prompt = sum(int(usage.get("prompt_tokens") or 0) for usage in usages) // n
    completion = sum(int(usage.get("completion_tokens") or 0) for usage in usages)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
