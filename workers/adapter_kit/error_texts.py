"""Patterns of error messages of text servers, beside those of `error_mapping`. Pure.

Each is from a server's own messages in public reports; tests/backends/shapes holds them with their sources.
"""

from __future__ import annotations

import re

TOO_LONG = re.compile(
    r"maximum prompt length is \d"  # xAI
    r"|maximum (?:allowed )?input length|maximum supported sequence length"  # OpenRouter, TensorRT-LLM, FriendliAI
    r"|exceed\w* (?:the )?model token limit|token limit exceeded"  # Kimi
    r"|context[_ ]window[_ ]exceeded|context window ?exceed"  # z.ai, LiteLLM
    r"|range of input length should be"  # Qwen
    r"|prompt ?超长|(?:输入|上下文|内容)\w{0,6}(?:超限|超过|超出)"  # z.ai and others in China
    r"|prompt\b.{0,60}\btoo long to fit"  # vLLM
    r"|model's context length is only"  # vLLM
    r"|exceeds maximum allowed token size"  # NVIDIA NIM
    r"|number of input tokens \d+ cannot exceed"  # watsonx
    r"|exceeds? (?:the )?max(?:imum)? (?:number of )?(?:tokens|context)"
    r"|\b(?:prompt|input|sequence|conversation)\b.{0,40}\bexceeds? (?:the )?max(?:imum)? length"
    r"|greater than (?:the )?(?:max_seq_len|max_model_len|context)"
    r"|conversation is too long|input or output tokens must be reduced",  # Writer, Bedrock
    re.IGNORECASE,
)
THROTTLED = re.compile(
    r"throttl|rate.?limit|too many requests|per (?:minute|hour|day)|please wait|\bquota\b", re.IGNORECASE
)
"""Messages about tokens or requests in a period of time, which `TOO_LONG` must not match."""
FLAGGED = re.compile(
    r"inappropriate content|content exists risk|usage (?:guidelines|policies)|safety_check|data_inspection|不安全|敏感"
    r"|content safety|prohibited content",
    re.IGNORECASE,
)
"""Messages about an input that a content policy rejects: DeepSeek, Qwen, xAI, z.ai, OpenAI."""
STATUSES = (
    (429, re.compile(r"rate.?limit|too.?many.?requests|throttl|resource.?exhausted")),
    (402, re.compile(r"insufficient.?(?:quota|credits?|balance|funds)|billing|payment.?required")),
    (503, re.compile(r"overloaded|unavailable|no.?capacity|engine.?busy")),
    (401, re.compile(r"authentication|unauthorized|permission.?(?:denied|error)|invalid.?api.?key")),
    (404, re.compile(r"not.?found|model_does_not_exist")),
    (504, re.compile(r"timeout|timed.?out")),
    (400, re.compile(r"invalid.?request|bad.?request|validation|invalid.?(?:argument|parameter|value)")),
)
"""The status for an error object's type or code, where it came without a status, inside a stream."""


def is_too_long(message: str) -> bool:
    """Return whether a message says that the request holds more tokens than the model takes."""
    return bool(TOO_LONG.search(message))


def is_throttled(message: str) -> bool:
    """Return whether a message is about a rate limit."""
    return bool(THROTTLED.search(message))


def status_for(*words: str) -> int:
    """Return the HTTP status that an error's type or code stands for; 0 where it is unknown."""
    text = " ".join(words).lower()
    return next((status for status, meant in STATUSES if meant.search(text)), 0)
