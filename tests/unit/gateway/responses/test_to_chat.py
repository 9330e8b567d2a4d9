"""The translation of requests for responses into chat requests, and their rejections."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http.request_body import validate_body
from gateway.responses.input_items import input_item_objects, to_messages
from gateway.responses.resource import initial_response
from gateway.responses.to_chat import chat_body, conversation, reject_unsupported, without_openai_tools
from schemas.errors import InvalidRequest
from schemas.openai.chat import ChatRequest
from schemas.openai.responses import UNSUPPORTED_FIELDS, InputItem, ResponsesRequest

FUNCTION: Any = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
USER: Any = {"role": "user", "content": "hi"}
OTHER: Any = {"type": "function", "name": "g"}


def request(**fields: Any) -> ResponsesRequest:
    return validate_body({"model": "m", "input": "hi"} | fields, ResponsesRequest)


def body(**fields: Any) -> dict[str, Any]:
    asked = request(**fields)
    reject_unsupported(asked)
    created = chat_body(asked, conversation(asked, []))
    validate_body(created, ChatRequest)
    return created


def refused(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        body(**fields)
    return caught.value.info.param


def said(*items: Any) -> list[dict[str, Any]]:
    return to_messages([InputItem.model_validate(item) for item in items])


class TestBody:
    def test_the_least(self) -> None:
        """A text is a user's message; the stream and its usage are always asked for, and nothing else."""
        assert body() == {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def test_nulls_are_nothing(self) -> None:
        """SDKs send null for what was left out."""
        names = [name for name, field in ResponsesRequest.model_fields.items() if not field.is_required()]
        assert body(**dict.fromkeys(names), conversation=None, prompt=None, seed=None) == body()

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ({"max_output_tokens": 5}, {"max_tokens": 5}),
            ({"temperature": 0.2, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9}),
            ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
            ({"service_tier": "flex"}, {"service_tier": "flex"}),
            ({"service_tier": "fast"}, {"service_tier": "priority"}),
            ({"user": "u"}, {"user": "u"}),
            ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"verbosity": "low"}),
            ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
            ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
            ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
            ({"include": ["reasoning.encrypted_content"]}, {}),
            ({"metadata": {"a": "b"}, "store": False, "background": False, "truncation": "disabled"}, {}),
            (
                {"safety_identifier": "s", "prompt_cache_key": "k", "client_metadata": {"a": "b"}, "max_tool_calls": 2},
                {},
            ),
            ({"stream": True, "stream_options": {"include_obfuscation": True}}, {}),
            ({"top_k": 5, "echo": {"tokens": 3}}, {"top_k": 5, "echo": {"tokens": 3}}),
        ],
    )
    def test_options(self, asked: Any, told: Any) -> None:
        """Options travel under chat's names; what has no effect stays here; what OpenAI does not know goes on as it is."""
        assert body(**asked) == body() | told

    def test_a_format_by_a_schema(self) -> None:
        """A JSON schema stands a level deeper in chat."""
        wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
        assert body(text={"format": wanted})["response_format"] == {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        }
        assert refused(text={"format": {"type": "json_schema", "schema": {}}}) == "text.format.name"
        assert refused(text={"format": {"type": "json_schema", "name": "n"}}) == "text.format.schema"

    @pytest.mark.parametrize("name", sorted(UNSUPPORTED_FIELDS))
    def test_what_is_not_supported(self, name: str) -> None:
        """Left out, it would change the answer; so it is refused by name."""
        assert refused(**{name: "x"}) == name

    def test_other_refusals(self) -> None:
        assert refused(truncation="auto") == "truncation"
        assert refused(background=True, store=False) == "store"


class TestTools:
    def test_functions(self) -> None:
        """Functions are nested one level deeper in chat; tool choices keep their names."""
        created = body(tools=[FUNCTION, OTHER], parallel_tool_calls=False, tool_choice="required")
        function = {name: FUNCTION[name] for name in ("name", "description", "parameters", "strict")}
        assert created["tools"] == [
            {"type": "function", "function": function},
            {"type": "function", "function": {"name": "g"}},
        ]
        assert (created["parallel_tool_calls"], created["tool_choice"]) == (False, "required")
        assert body(tools=[], tool_choice="auto", parallel_tool_calls=True) == body()

    def test_one_function(self) -> None:
        chosen = body(tools=[FUNCTION], tool_choice={"type": "function", "name": "f"})["tool_choice"]
        assert chosen == {"type": "function", "function": {"name": "f"}}

    def test_allowed_tools(self) -> None:
        """The server receives only the allowed tools."""
        choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
        created = body(tools=[FUNCTION, OTHER], tool_choice=choice)
        assert [tool["function"]["name"] for tool in created["tools"]] == ["g"]
        assert created["tool_choice"] == "required"

    @pytest.mark.parametrize(
        "extra",
        [
            {"tools": [FUNCTION, {"type": "web_search"}]},
            {"tools": [{"type": "custom", "name": "apply_patch", "format": {"type": "text"}}, FUNCTION]},
            {"tools": [{"type": "namespace", "name": "n", "tools": []}, FUNCTION]},
            {"tools": [], "input": [{"type": "additional_tools", "tools": [FUNCTION, {"type": "mcp"}, 7]}, USER]},
            {"tools": [FUNCTION], "input": [{"type": "additional_tools", "tools": None}, USER]},
        ],
    )
    def test_other_tools_are_left_out(self, extra: Any) -> None:
        """Agents work: the model is offered the caller's functions, and the response lists them."""
        asked = without_openai_tools(request(**{"input": [USER]} | extra))
        created = chat_body(asked, conversation(asked, []))
        assert [tool["function"]["name"] for tool in created["tools"]] == ["f"]
        assert created["messages"] == [{"role": "user", "content": "hi"}]
        assert [tool["name"] for tool in initial_response(asked, "job_" + "0" * 32, 1)["tools"]] == ["f"]

    def test_a_choice_of_a_tool_that_was_left_out_is_refused(self) -> None:
        """What the caller insisted on cannot be had: an answer without it would not be what was asked for."""
        for choice in ("required", {"type": "web_search"}):
            asked = without_openai_tools(request(tools=[{"type": "web_search"}], tool_choice=choice))
            with pytest.raises(InvalidRequest):
                chat_body(asked, [])

    @pytest.mark.parametrize(
        ("wrong", "param"),
        [
            ({"tools": [FUNCTION, {"type": "web_search"}]}, "tools.1.type"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": "maybe"}, "tool_choice"),
            ({"tools": [OTHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
            ({"tools": [OTHER], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
            ({"tools": [OTHER], "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice.mode"),
            ({"tools": [OTHER], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ],
    )
    def test_refusals(self, wrong: Any, param: str) -> None:
        assert refused(**wrong) == param


class TestItems:
    def test_a_whole_exchange(self) -> None:
        """The model's text and calls form one message; outputs are tool messages."""
        exchange = said(
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "id": "rs", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x":1}'},
            {"type": "function_call", "call_id": "b", "name": "g", "arguments": ""},
            {"type": "function_call_output", "call_id": "a", "output": "sun"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        )
        assert exchange == [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "I look",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                    {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
            {"role": "tool", "tool_call_id": "b", "content": "rain"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ]

    def test_results_follow_their_calls(self) -> None:
        """A tool message directly follows its call, before messages that were in between."""

        def call(name: str) -> Any:
            return {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"}

        def result(name: str) -> Any:
            return {"type": "function_call_output", "call_id": name, "output": name}

        def words(text: str) -> Any:
            return {"role": "assistant", "content": text}

        items = [call("a"), call("b"), words("wait"), result("a"), result("b"), call("c"), words("done?"), result("c")]
        told = [message.get("tool_call_id") or message["content"] for message in said(*items)]
        assert told == [None, "a", "b", "wait", "c", "done?"]
        assert [one["id"] for one in said(*items)[3]["tool_calls"]] == ["c"]
        assert said(result("unknown"))[0]["tool_call_id"] == "unknown"

    def test_calls_that_are_no_functions(self) -> None:
        """What a caller's other tools were called with becomes JSON, which is all that chat's calls hold."""
        calls: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
            ({"type": "custom_tool_call", "call_id": "a", "name": "apply_patch", "input": "*** Begin"}, "apply_patch", {"input": "*** Begin"}),
            ({"type": "local_shell_call", "id": "lsh", "action": {"type": "exec", "command": ["ls"]}}, "local_shell", {"type": "exec", "command": ["ls"]}),
            ({"type": "shell_call", "call_id": "s", "action": {"commands": ["ls"]}}, "shell", {"commands": ["ls"]}),
        ]  # fmt: skip
        for item, name, arguments in calls:
            (call,) = said(item)[0]["tool_calls"]
            assert call["id"] == item.get("call_id", item.get("id"))
            assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (name, arguments)

    @pytest.mark.parametrize(
        ("item", "text"),
        [
            ({"type": "custom_tool_call_output", "output": "done"}, "done"),
            ({"type": "custom_tool_call_output", "output": [{"type": "input_text", "text": "done"}]}, "done"),
            ({"type": "local_shell_call_output", "output": '{"exit": 0}'}, '{"exit": 0}'),
            ({"type": "shell_call_output", "output": [{"stdout": "a", "stderr": "b"}, {"stdout": "c"}]}, "ab\nc"),
            ({"type": "function_call_output", "output": {"content": "it failed", "success": False}}, "it failed"),
            ({"type": "function_call_output", "output": []}, ""),
        ],
    )
    def test_results(self, item: Any, text: str) -> None:
        assert said(item | {"call_id": "c"}) == [{"role": "tool", "tool_call_id": "c", "content": text}]

    def test_pictures_of_functions(self) -> None:
        """A tool's message is text: its pictures follow the results, in the order of the calls."""

        def call(name: str) -> Any:
            return {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"}

        def shot(name: str) -> Any:
            parts = [{"type": "input_text", "text": name}, {"type": "input_image", "image_url": f"data:{name}"}]
            return {"type": "function_call_output", "call_id": name, "output": parts}

        told = said(call("a"), call("b"), shot("a"), {"role": "assistant", "content": "wait"}, shot("b"))
        assert [(one["role"], one.get("tool_call_id")) for one in told] == [
            ("assistant", None), ("tool", "a"), ("tool", "b"), ("user", None), ("user", None), ("assistant", None),
        ]  # fmt: skip
        assert [one["content"] for one in told[1:3]] == ["a", "b"]
        assert [one["content"][1]["image_url"]["url"] for one in told[3:5]] == ["data:a", "data:b"]
        only = said(
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": "data:x"}]}
        )
        assert (only[0]["content"], only[1]["content"][1]["type"]) == ("(an image)", "image_url")

    def test_items_of_tools_that_openai_runs_are_left_out(self) -> None:
        """Conversations begun at OpenAI continue here; `RESPONSES_OTHER_TOOLS=refuse` rejects them by name."""
        items = [USER, {"type": "web_search_call", "id": "w", "status": "completed"}, {"type": "ghost_snapshot"}]
        asked = without_openai_tools(request(input=items))
        assert conversation(asked, []) == [USER]

    def test_content(self) -> None:
        """A single text becomes a string, several parts stay parts, and a refusal becomes text."""
        assert said({"role": "developer", "content": [{"type": "input_text", "text": "a"}]}) == [
            {"role": "developer", "content": "a"}
        ]
        parts = [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "image_url": "data:x", "detail": "high"},
            {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        ]
        assert said({"role": "user", "content": parts})[0]["content"] == [
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}},
            {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        ]
        refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
        assert said(refusal) == [{"role": "assistant", "content": "no"}]

    @pytest.mark.parametrize(
        ("item", "param"),
        [
            ({"type": "web_search_call", "id": "w"}, "input.0.type"),
            ({"type": "compaction", "encrypted_content": "x"}, "input.0.type"),
            ({"content": "x"}, "input.0.role"),
            ({"role": "tool", "content": "x"}, "input.0.role"),
            ({"role": "user"}, "input.0.content"),
            ({"role": "user", "content": [{"type": "input_file"}]}, "input.0.content.0.type"),
            ({"role": "user", "content": [{"type": "input_text"}]}, "input.0.content.0.text"),
            ({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}, "input.0.content.0.image_url"),
            ({"role": "assistant", "content": [{"type": "input_image", "image_url": "x"}]}, "input.0.content.0.type"),
            ({"type": "function_call", "name": "f", "arguments": ""}, "input.0.call_id"),
            ({"type": "function_call", "call_id": "c", "arguments": ""}, "input.0.name"),
            ({"type": "function_call_output", "call_id": "c"}, "input.0.output"),
            (
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]},
                "input.0.output.0.image_url",
            ),
            (
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file", "file_id": "f"}]},
                "input.0.output.0.type",
            ),
            ({"type": "custom_tool_call", "name": "f", "input": "x"}, "input.0.call_id"),
            ({"type": "custom_tool_call_output", "call_id": "c"}, "input.0.output"),
        ],
    )
    def test_refusals(self, item: Any, param: str) -> None:
        """Items that chat cannot express are rejected with their path."""
        assert refused(input=[item]) == param

    def test_listed(self) -> None:
        """Listed items have an id, the same each time, and their content in parts."""
        response = "resp_" + "0" * 32
        items = [
            InputItem.model_validate(item)
            for item in (
                {"role": "user", "content": "a"},
                {"type": "message", "id": "msg_mine", "role": "assistant", "content": "b"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            )
        ]
        shown = input_item_objects(items, response)
        assert shown == input_item_objects(items, response)
        assert [item["id"] for item in shown] == [f"msg_{'0' * 32}_i0", "msg_mine", f"fco_{'0' * 32}_i2"]
        assert [item["content"][0]["type"] for item in shown[:2]] == ["input_text", "output_text"]
        assert input_item_objects("hi", response)[0]["content"] == [{"type": "input_text", "text": "hi"}]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.text(max_size=3)
    | st.sampled_from(["auto", "function", "message"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "name", "text", "content", "role", "tools", "mode", "image_url", "format", "schema"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
NAMES = st.sampled_from([*ResponsesRequest.model_fields, "seed", "conversation"])
PLACES = st.sampled_from(["type", "role", "content", "call_id", "name", "arguments", "output", "status", "id"])
KINDS = st.sampled_from(["message", "function_call", "function_call_output", "reasoning"])
PARTS = st.dictionaries(st.sampled_from(["type", "text", "image_url", "detail", "input_audio"]), VALUES, max_size=3)
ITEMS = st.tuples(KINDS, st.dictionaries(PLACES, VALUES | st.lists(PARTS, max_size=2), max_size=5)).map(
    lambda item: {"type": item[0], "role": "user", "content": "x"} | item[1]
)


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.none() | st.lists(ITEMS, min_size=1, max_size=3))
@settings(max_examples=150)
def test_any_request_is_understood_or_refused(fields: dict[str, Any], items: Any) -> None:
    """Whatever is asked, there is a chat request and a response for it, or a 400."""
    try:
        asked = request(**fields | ({"input": items} if items else {}))
        reject_unsupported(asked)
        asked = without_openai_tools(asked)
        validate_body(chat_body(asked, conversation(asked, [])), ChatRequest)
        shown = input_item_objects(asked.input, "resp_" + "0" * 32)
        assert all(isinstance(item["id"], str) for item in shown)
        assert initial_response(asked, "job_" + "0" * 32, 1)["object"] == "response"
    except InvalidRequest:
        pass
