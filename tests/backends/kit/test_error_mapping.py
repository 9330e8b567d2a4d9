"""Servers' error answers, in their own messages, as errors of the worker."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from workers.adapter_kit.error_mapping import error_from_payload, error_from_response
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable

TOO_LONG = [
    (500, {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}),
    (400, {"error": {"code": 400, "message": "the request exceeds the available context size, try increasing it", "type": "exceed_context_size_error"}}),
    (500, {"error": {"code": 500, "message": "input (2012 tokens) is too large to process. increase the physical batch size (current batch size: 512)"}}),
    (400, {"object": "error", "message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.", "type": "BadRequestError", "code": 400}),
    (400, {"error": {"message": "The decoder prompt (length 9000) is longer than the maximum model length of 4096.", "type": "BadRequestError", "code": 400}}),
    (400, {"object": "error", "message": "The input (70000 tokens) is longer than the model's context length (32768 tokens).", "type": "BadRequestError"}),
    (400, {"object": "error", "message": "Requested token count exceeds the model's maximum context length of 32768 tokens.", "type": "BadRequestError"}),
    (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 200 `max_new_tokens`", "error_type": "validation"}),
    (413, {"error": "Input validation error: `inputs` must have less than 512 tokens. Given: 900", "error_type": "Validation"}),
    (400, {"error": "the input length exceeds the context length"}),
    (500, {"error": "Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens"}),
    (400, {"message": "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length", "type": "invalid_request_error"}),
    (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"}}),
    (400, {"error": {"code": 400, "message": "The input token count (1100000) exceeds the maximum number of tokens allowed (1048576)."}}),
    (400, {"error": {"message": "Please reduce the length of the messages or completion.", "type": "invalid_request_error", "code": "context_length_exceeded"}}),
    (400, {"code": "Client specified an invalid argument", "error": "This model's maximum prompt length is 131072 but the request contains 537812 tokens."}),
    (400, {"error": {"message": "Input length 1000 exceeds the maximum allowed input length of 900 tokens."}}),
    (400, {"error": {"message": "Invalid request: Your request exceeded model token limit: 262144 (requested: 269030)"}}),
    (400, {"error": {"code": "1261", "message": "Prompt 超长"}}),
    (500, {"message": "Encountered an error in forwardAsync function: Input length (9000) exceeds maximum input length (8192)"}),
    (422, {"detail": "The total number of tokens (prompt + max_tokens) 5000 is greater than max_seq_len 4096"}),
    (400, {"error": {"message": "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 30720]"}}),
    (413, {"error": {"message": "Request body too large for gpt-4o model. Max size: 8000 tokens.", "code": "tokens_limit_reached"}}),
    (400, {"errors": [{"code": "invalid_input_argument", "message": "the number of input tokens 5000 cannot exceed the total tokens limit 4096 for this model"}]}),
    (400, {"error": {"message": "This model's maximum context length is 4096 tokens.", "type": "invalid_request_error", "code": "invalid_value"}}),
    # Embedders and rerankers.
    (400, {"error": "Input length 9000 exceeds maximum allowed token size 512", "type": "invalid_request_error"}),
    (500, {"error": {"code": 500, "message": "input is too large to process. increase the physical batch size", "type": "server_error"}}),
    (500, {"error": {"code": 500, "message": "input (700 tokens) is larger than the max context size (512 tokens). skipping", "type": "server_error"}}),
    (400, {"object": "error", "message": "This model's maximum context length is 512 tokens. However, you requested 700 tokens in the input for embedding generation. Please reduce the length of the input.", "type": "BadRequestError", "param": None, "code": 400}),
    (400, {"error": {"message": "You passed 700 input tokens and requested 0 output tokens. However, the model's context length is only 512 tokens, resulting in a maximum input length of 512 tokens.", "type": "BadRequestError", "param": None, "code": 400}}),
    (500, {"error": {"message": "The prompt (total length 700) is too long to fit into the model (context length 512).", "type": "InternalServerError", "code": 500}}),
    (413, {"error": "Input validation error: `inputs` must have less than 512 tokens. Given: 700", "type": "Validation", "message": "Input validation error: `inputs` must have less than 512 tokens. Given: 700"}),
    (500, {"error": "input length exceeds maximum context length"}),
    (422, {"detail": [{"type": "string_too_long", "loc": ["body", "input", 0], "msg": "String should have at most 122880 characters", "input": "x"}]}),
    (422, {"detail": [{"type": "value_error.any_str.max_length", "loc": ["body", "documents", 3], "msg": "ensure this value has at most 8192 characters"}]}),
    (400, {"error": {"message": "Invalid 'input[0]': maximum input length is 8192 tokens.", "type": "invalid_request_error", "param": None, "code": None}}),
    (400, {"object": "error", "message": {"detail": "Input id 0 has 9000 tokens, exceeding max 8192 tokens."}, "type": "invalid_request_error"}),
    (400, {"detail": "Single text cannot exceed 8194 tokens. 9000 tokens given."}),
    (400, {"detail": "Request to model failed. The max allowed tokens per submitted batch is 120000. Your batch has 130000 tokens."}),
    (500, {"error": "Token indices sequence length is longer than the specified maximum sequence length for this model (700 > 512)"}),
    (400, {"error": {"message": "litellm.ContextWindowExceededError: OllamaException", "type": None, "code": "400"}}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), TOO_LONG, ids=lambda value: str(value)[:60])
def test_a_prompt_that_does_not_fit(status: int, body: Any) -> None:
    """The caller gets 400 `context_length_exceeded` with the server's message, and no retry."""
    error = error_from_response(status, {}, orjson.dumps(body))
    assert isinstance(error, BackendRefused)
    assert not error.transient
    assert (error.info.status, error.info.type, error.info.code) == (
        400,
        "invalid_request_error",
        "context_length_exceeded",
    )
    assert error.info.message.rpartition(": ")[2].lower() in orjson.dumps(body).decode().lower()
    assert error_from_payload(body).info.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, "CUDA error: out of memory"),
        (500, "unexpected token in the model file"),
        (400, "max_tokens must be at least 1, got 0"),
        (400, "image exceeds 5 MB maximum"),
        (422, "batch size 33 > maximum allowed batch size 32"),
        (400, "dimensions must not exceed 1024"),
        (400, "Invalid token in tool call"),
        (400, "tools.0.function.name exceeds maximum length of 64"),
        (500, "ThrottlingException: Too many tokens, please wait before trying again."),
        (500, "request exceeded the time limit"),
        (429, "Request too large for model: tokens per minute limit 6000, requested 7000; please reduce the length of your prompt"),
    ],
)  # fmt: skip
def test_other_errors_are_not_about_the_context(status: int, message: str) -> None:
    error = error_from_response(status, {}, orjson.dumps({"error": {"message": message}}))
    assert error.info.code != "context_length_exceeded"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"message": "Your input was flagged by moderation", "code": "content_policy_violation"}, "content_policy_violation"),
        ({"message": 'openai/gpt requires moderation on X. Your input was flagged for "violence"', "code": 403}, "content_policy_violation"),
        ({"message": "The response was filtered due to Azure's content management policy.", "code": "content_filter"}, "content_filter"),
    ],
)  # fmt: skip
def test_an_input_that_was_flagged(error: Any, code: str) -> None:
    """The error concerns the caller's input, not the worker's key, and the caller reads why."""
    refused = error_from_response(403, {}, orjson.dumps({"error": error}))
    assert (refused.info.status, refused.info.code, refused.info.message) == (400, code, error["message"])


@pytest.mark.parametrize(
    "body",
    [
        {"statusCode": 400, "error": "Bad Request", "message": "body/messages must be an array"},
        {
            "timestamp": 1,
            "status": 400,
            "error": "Bad Request",
            "message": "body/messages must be an array",
            "path": "/v1",
        },
        {"error": "body/messages must be an array", "message": "Bad Request"},
    ],
)
def test_the_longer_of_two_messages_is_passed_on(body: Any) -> None:
    """Spring's and Nest's servers put the status's name into `error`."""
    assert error_from_response(400, {}, orjson.dumps(body)).info.message == "body/messages must be an array"


def test_any_other_403_is_the_key() -> None:
    """Its message is dropped: it may quote the key."""
    for message in ("Invalid key sk-1", "You have no access to this project", ""):
        refused = error_from_response(403, {}, orjson.dumps({"error": {"message": message}}))
        assert (refused.info.status, refused.info.message) == (502, "the backend refused the worker's key (403)")


@pytest.mark.parametrize("field", ["type", "code"])
def test_a_quota_that_is_used_up(field: str) -> None:
    """The caller gets 429 with the server's code, and neither the worker nor the caller retries."""
    error = {"message": "You exceeded your current quota", field: "insufficient_quota"}
    refused = error_from_response(429, {"retry-after": "5"}, orjson.dumps({"error": error}))
    assert isinstance(refused, BackendRefused)
    assert (refused.info.status, refused.info.code, refused.info.should_retry) == (429, "insufficient_quota", False)
    assert refused.info.headers() == {"x-should-retry": "false"}


def test_a_rate_limit_stays_one() -> None:
    """The caller gets 429 with the server's code and time; the worker pauses the model meanwhile."""
    error = {"message": "slow down", "type": "tokens", "code": "rate_limit_exceeded"}
    limited = error_from_response(429, {"retry-after": "7"}, orjson.dumps({"error": error}))
    assert isinstance(limited, BackendUnavailable)
    assert (limited.transient, limited.pause_s) == (True, 7.0)
    assert (limited.info.status, limited.info.type, limited.info.code) == (429, "tokens", "rate_limit_exceeded")
    assert limited.info.headers() == {"retry-after": "7"}
    bare: BackendError = error_from_response(429, {}, b"")
    assert (bare.info.status, bare.info.type, bare.info.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert bare.info.retry_after_s == BackendUnavailable.retry_after_s
