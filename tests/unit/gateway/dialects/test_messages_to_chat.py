"""The translation of requests for messages into chat requests, and their rejections."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.dialects.anthropic.to_chat import chat_body
from gateway.http.request_body import validate_body
from schemas.anthropic.messages import UNSUPPORTED_FIELDS, MessagesRequest
from schemas.errors import InvalidRequest
from schemas.openai.chat import ChatRequest

USER: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}
CALL: Any = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}
PNG: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def body(*, refuse_server_tools: bool = False, **fields: Any) -> dict[str, Any]:
    request = validate_body({"model": "m", "max_tokens": 9, "messages": [USER]} | fields, MessagesRequest)
    chat = chat_body(request, refuse_server_tools=refuse_server_tools)
    validate_body(chat, ChatRequest)
    return chat


def said(*messages: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body(messages=list(messages))["messages"]
    return found


def refused(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        body(**fields)
    return caught.value.info.param


class TestBody:
    def test_the_least(self) -> None:
        """Model, messages and the limit of tokens are all that is sent."""
        assert body() == {"model": "m", "messages": [USER], "max_tokens": 9}

    def test_a_stream_asks_for_usage(self) -> None:
        """The last event of a stream holds the usage, so that the server must count."""
        assert body(stream=True).items() >= {"stream": True, "stream_options": {"include_usage": True}}.items()

    def test_fields_with_other_names(self) -> None:
        """Stop sequences, the user and the tier have other names in chat."""
        chat = body(
            stop_sequences=["a", "b"], metadata={"user_id": "u"}, service_tier="standard_only", top_k=5, temperature=1
        )
        assert chat.items() >= {"stop": ["a", "b"], "user": "u", "service_tier": "default", "top_k": 5}.items()
        assert body(service_tier="flex")["service_tier"] == "flex"

    def test_fields_without_effect(self) -> None:
        """Hints for Anthropic's own servers are accepted, and reach no server."""
        hints: Any = {"cache_control": {"type": "ephemeral"}, "context_management": {"edits": []}, "speed": "fast"}
        assert body(**hints, inference_geo="eu", diagnostics={}) == body()

    def test_unknown_fields_pass(self) -> None:
        """Fields that Anthropic does not define reach the server, and nulls are nothing."""
        assert body(min_p=0.1, seed=None) == body() | {"min_p": 0.1}

    @pytest.mark.parametrize("name", UNSUPPORTED_FIELDS)
    def test_what_cannot_be_honored_is_refused_by_name(self, name: str) -> None:
        assert refused(**{name: 2}) == name

    @pytest.mark.parametrize(
        ("fields", "effort"),
        [
            ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
            ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, "medium"),
            ({"thinking": {"type": "enabled", "budget_tokens": 32_000}}, "high"),
            ({"thinking": {"type": "adaptive"}}, None),
            ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "high"),
            ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
        ],
    )
    def test_thinking(self, fields: Any, effort: str | None) -> None:
        """A budget or an effort becomes chat's effort; a model that decides by itself is sent none."""
        assert body(**fields).get("reasoning_effort") == effort

    def test_a_format(self) -> None:
        """A JSON schema is chat's response format."""
        schema = {"type": "object"}
        chat = body(output_config={"format": {"type": "json_schema", "schema": schema}})
        assert chat["response_format"]["json_schema"]["schema"] == schema
        assert refused(output_config={"format": {"type": "xml"}}) == "output_config.format.type"
        assert refused(output_config={"format": {"type": "json_schema"}}) == "output_config.format.schema"


class TestConversation:
    def test_a_system_prompt(self) -> None:
        """The system prompt, a string or blocks, is the first message; one within the conversation is part of the user's."""
        blocks = [text("be brief") | {"cache_control": {"type": "ephemeral"}}, text("be kind")]
        assert body(system=blocks)["messages"][0] == {"role": "system", "content": "be brief\n\nbe kind"}
        assert body(system="x")["messages"] == [{"role": "system", "content": "x"}, USER]
        assert body(system="")["messages"] == [USER]
        later = {"role": "system", "content": "now"}
        assert said(USER, later) == [{"role": "user", "content": "hi\n<system>\nnow\n</system>"}]
        assert refused(system=[PNG]) == "system.0.type"

    def test_neighbors_of_one_role_are_one_message(self) -> None:
        """Many chat templates want roles to alternate."""
        assert said(USER, {"role": "user", "content": [text("you")]}) == [{"role": "user", "content": "hi\nyou"}]
        both = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": [text("b")]}]
        assert said(USER, *both)[1:] == [{"role": "assistant", "content": "ab"}]

    def test_images(self) -> None:
        """Images in Base64 become data URLs; images by URL are fetched later, as all are."""
        by_url = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
        content = said({"role": "user", "content": [text("see"), PNG, by_url]})[0]["content"]
        assert content[:2] == [text("see"), IMAGE]
        assert content[2]["image_url"]["url"] == "https://example.com/a.png"

    def test_documents(self) -> None:
        """Text stands within a tag with its title; a PDF is chat's file part."""
        plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
        blocks = {"type": "document", "source": {"type": "content", "content": [text("y")]}}
        found = {"type": "search_result", "title": "S", "source": "u", "content": [text("z")]}
        assert said({"role": "user", "content": [plain, blocks, found]})[0]["content"] == (
            '<document title="T">\nx\n</document>\n<document>\ny\n</document>\n'
            '<search_result title="S" source="u">\nz\n</search_result>'
        )
        pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
        part = said({"role": "user", "content": [pdf]})[0]["content"][0]
        assert part["file"]["file_data"] == "data:application/pdf;base64,aGk="

    def test_a_tool_loop(self) -> None:
        """Calls and results keep their ids; what follows the results is a user's message."""
        results: Any = [
            {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
            {"type": "tool_result", "tool_use_id": "t2", "content": [text("lost")], "is_error": True},
            text("go on"),
        ]
        messages = said(
            USER,
            {"role": "assistant", "content": [text("let me see"), CALL, CALL | {"id": "t2"}]},
            {"role": "user", "content": results},
        )
        assert [call["id"] for call in messages[1]["tool_calls"]] == ["t1", "t2"]
        assert messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Bern"}'}
        assert messages[2:] == [
            {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
            {"role": "tool", "tool_call_id": "t2", "content": "Error: lost"},
            {"role": "user", "content": "go on"},
        ]

    def test_images_of_a_tool(self) -> None:
        """A tool message holds text alone, so that its images follow in the user's message."""
        result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("a map"), PNG]}
        turns = [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}]
        *_, tool, user = said(*turns)
        assert tool["content"] == "a map"
        assert user["content"][1] == IMAGE

    def test_thoughts_of_the_present_turn(self) -> None:
        """The model gets back what it thought since the last question, and nothing older."""
        thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
        old = {"role": "assistant", "content": [thought, text("a")]}
        new = {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, CALL]}
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]}
        messages = said(USER, old, USER, new, result)
        assert "reasoning_content" not in messages[1]
        assert messages[3]["reasoning_content"] == "hm"
        assert messages[4] == {"role": "tool", "tool_call_id": "t1", "content": ""}

    def test_blocks_of_anthropics_tools(self) -> None:
        """Conversations begun at Anthropic hold blocks of tools that ran there: they are left out."""
        blocks = [{"type": "server_tool_use", "id": "s"}, {"type": "web_search_tool_result"}, text("found")]
        assert said(USER, {"role": "assistant", "content": blocks})[1]["content"] == "found"

    @pytest.mark.parametrize(
        ("block", "param"),
        [
            ({"type": "video"}, "type"),
            ({"type": "text"}, "text"),
            ({"type": "image"}, "source"),
            ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source.type"),
            ({"type": "image", "source": {"type": "base64", "data": "x"}}, "source.media_type"),
            ({"type": "document", "source": {"type": "url", "url": "https://x"}}, "source.type"),
            ({"type": "document", "citations": {"enabled": True}}, "citations"),
            ({"type": "document", "source": {"type": "base64", "media_type": "a/b", "data": ""}}, "source"),
            ({"type": "tool_result", "content": "x"}, "tool_use_id"),
        ],
    )
    def test_what_chat_cannot_express(self, block: Any, param: str) -> None:
        """The error names the block."""
        messages = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": [text("a"), block]}]
        assert refused(messages=messages) == f"messages.2.content.1.{param}"

    @pytest.mark.parametrize(
        ("block", "param"), [(PNG, "type"), (CALL | {"input": "x"}, "input"), (CALL | {"name": None}, "name")]
    )
    def test_what_an_assistant_cannot_say(self, block: Any, param: str) -> None:
        assert refused(messages=[USER, {"role": "assistant", "content": [block]}]) == f"messages.1.content.0.{param}"


class TestTools:
    def test_a_tool(self) -> None:
        """A tool is a function; hints for Anthropic's servers are left out."""
        tool = TOOL | {"type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}, "defer_loading": True}
        function = {"name": "weather", "parameters": {"type": "object"}, "description": "d", "strict": True}
        assert body(tools=[tool])["tools"] == [{"type": "function", "function": function}]

    @pytest.mark.parametrize(
        ("choice", "wanted"),
        [
            ({"type": "auto"}, "auto"),
            ({"type": "any"}, "required"),
            ({"type": "none"}, "none"),
            ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ],
    )
    def test_a_choice(self, choice: Any, wanted: Any) -> None:
        assert body(tools=[TOOL], tool_choice=choice)["tool_choice"] == wanted

    def test_one_call_at_a_time(self) -> None:
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        assert body(tools=[TOOL], tool_choice=choice)["parallel_tool_calls"] is False

    def test_tools_of_anthropic(self) -> None:
        """Tools that run at Anthropic are left out or refused, as the operator says; a choice without tools is nothing."""
        assert [tool["function"]["name"] for tool in body(tools=[SEARCH, TOOL])["tools"]] == ["weather"]
        assert "tools" not in body(tools=[SEARCH])
        assert "tool_choice" not in body(tools=[SEARCH], tool_choice={"type": "auto"})
        assert refused(tools=[SEARCH], refuse_server_tools=True) == "tools.0.type"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
            ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
            ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
            ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ],
    )
    def test_wrong_tools(self, fields: Any, param: str) -> None:
        assert refused(**fields) == param
