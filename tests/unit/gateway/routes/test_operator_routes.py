"""What operators and front ends ask of the gateway about models, aliases, services and voices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from backbone.testing.registry import MemoryHub, MemoryRegistry
from gateway.app import make_app
from gateway.auth.authenticator import Authenticator
from gateway.dependencies import Parts
from gateway.model_catalog import ModelCatalog
from schemas.jobs import Capability
from schemas.presence import ModelOffer, WorkerPresence, WorkerState

KEY = "sk-test"


def worker(
    name: str, *offers: ModelOffer, state: WorkerState = WorkerState.READY, backend: str = "echo"
) -> WorkerPresence:
    return WorkerPresence(id=name, backend=backend, host="here", models=offers, state=state)


def offer(name: str, *capabilities: Capability, **more: Any) -> ModelOffer:
    return ModelOffer(name=name, capabilities=capabilities or (Capability.CHAT,), **more)


class Gateway:
    """The cold routes, on a registry without a server."""

    def __init__(self) -> None:
        self.hub = MemoryHub()
        self.registry = MemoryRegistry(self.hub)
        catalog = ModelCatalog()
        self.registry.subscribe(catalog.load)
        dispatcher = SimpleNamespace(registry=self.registry, catalog=catalog, list_models=catalog.list_usable)
        app = make_app(cast("Parts", SimpleNamespace(dispatcher=dispatcher, auth=Authenticator(KEY))))
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers={"authorization": f"Bearer {KEY}"}
        )

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        answer = await self.http.request(method, path, **options)
        return answer.status_code, answer.json()

    async def refuses(self, method: str, path: str, **options: Any) -> tuple[int, str | None, str]:
        """Status, `param` and message of OpenAI's error object."""
        status, body = await self.ask(method, path, **options)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return status, body["error"]["param"], body["error"]["message"]

    async def set(self, alias: str, *targets: str) -> tuple[int, Any]:
        return await self.ask("PUT", f"/v1/aliases/{alias}", json={"targets": targets})

    async def listed(self) -> list[str]:
        return [model["id"] for model in (await self.ask("GET", "/v1/models"))[1]["data"]]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.registry.start()
    await gateway.registry.announce(worker("w", offer("llama3.1:8b"), offer("smollm2")))
    async with gateway.http:
        yield gateway


class TestAliases:
    async def test_set_listed_and_removed(self, gateway: Gateway) -> None:
        """What was set is listed at once, among the aliases and among the models, until it is removed."""
        shape = {
            "id": "org/chat:big",
            "object": "alias",
            "targets": ["away", "smollm2"],
            "resolves_to": "smollm2",
        }
        assert await gateway.set("org%2Fchat:big", "away", "smollm2", "away") == (
            200,
            shape | {"warnings": ["No worker serves or has served a model 'away'."]},
        )
        assert await gateway.ask("GET", "/v1/aliases") == (200, {"object": "list", "data": [shape]})
        assert await gateway.listed() == ["llama3.1:8b", "org/chat:big", "smollm2"]
        status, model = await gateway.ask("GET", "/v1/models/org/chat:big")
        assert (status, model["id"], model["owned_by"]) == (200, "org/chat:big", "nexus")
        assert (model["alias_for"], model["resolves_to"]) == (["away", "smollm2"], "smollm2")
        assert await gateway.ask("DELETE", "/v1/aliases/org/chat:big") == (
            200,
            {"id": "org/chat:big", "object": "alias", "deleted": True},
        )
        assert await gateway.listed() == ["llama3.1:8b", "smollm2"]

    async def test_a_target_that_no_model_has_for_a_name_is_a_warning(self, gateway: Gateway) -> None:
        """The warning suggests a similar model. The alias is stored, since models may come later."""
        status, answer = await gateway.set("tts-1", "smolm2", "smollm2")
        assert (status, answer["targets"]) == (200, ["smolm2", "smollm2"])
        assert answer["warnings"] == ["No worker serves or has served a model 'smolm2'. Did you mean 'smollm2'?"]
        assert (await gateway.set("tts-1", "smollm2"))[1]["warnings"] == []

    async def test_set_again_replaces(self, gateway: Gateway) -> None:
        """At run time, from one model to another."""
        await gateway.set("x", "smollm2")
        assert (await gateway.set("x", "llama3.1:8b"))[1]["resolves_to"] == "llama3.1:8b"
        assert len((await gateway.ask("GET", "/v1/aliases"))[1]["data"]) == 1

    async def test_one_that_resolves_to_nothing_is_no_model_but_an_alias(self, gateway: Gateway) -> None:
        """An operator sees it, callers do not."""
        assert (await gateway.set("x", "later"))[1]["resolves_to"] is None
        assert "x" not in await gateway.listed()
        assert (await gateway.refuses("GET", "/v1/models/x"))[0] == 404
        await gateway.registry.announce(worker("w2", offer("later")))
        assert "x" in await gateway.listed()

    async def test_what_would_have_no_effect_is_refused(self, gateway: Gateway) -> None:
        """A model's name, an alias of an alias from either side, itself."""
        await gateway.set("x", "later")
        for alias, targets, param in [
            ("smollm2", ["llama3.1:8b"], "alias"),
            ("y", ["smollm2", "x"], "targets"),
            ("x", ["x"], "targets"),
            ("later", ["smollm2"], "alias"),
        ]:
            status, named, _ = await gateway.refuses("PUT", f"/v1/aliases/{alias}", json={"targets": targets})
            assert (status, named) == (400, param), alias
        assert list(gateway.hub.aliases) == ["x"]

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            (b"", None),
            (b"[1", None),
            (b'["smollm2"]', None),
            (b"{}", "targets"),
            (b'{"targets": []}', "targets"),
            (b'{"targets": "smollm2"}', "targets"),
            (b'{"targets": [1]}', "targets.0"),
            (b'{"targets": [""]}', "targets"),
            (b'{"targets": [" a"]}', "targets"),
            (b'{"targets": ["smollm2"], "target": "x"}', "target"),
            (b'{"targets": [NaN]}', None),
        ],
    )
    async def test_a_wrong_body_is_refused(self, gateway: Gateway, body: bytes, param: str | None) -> None:
        """400, with the field that is wrong; nothing is written."""
        assert (await gateway.refuses("PUT", "/v1/aliases/x", content=body))[:2] == (400, param)
        assert gateway.hub.aliases == {}

    async def test_a_wrong_name_is_refused(self, gateway: Gateway) -> None:
        """What cannot be typed or printed."""
        for name in ("%20x", "a%09b", "x" * 201):
            refusal = await gateway.refuses("PUT", f"/v1/aliases/{name}", json={"targets": ["smollm2"]})
            assert refusal[:2] == (400, "alias")

    async def test_a_body_that_is_too_large_is_413(self, gateway: Gateway) -> None:
        """These bodies are small."""
        body = b'{"targets": ["' + b"x" * 70_000 + b'"]}'
        assert (await gateway.refuses("PUT", "/v1/aliases/x", content=body))[0] == 413

    async def test_removing_what_is_not_there_is_404(self, gateway: Gateway) -> None:
        """A misspelt name is not a success."""
        status, body = await gateway.ask("DELETE", "/v1/aliases/nobody")
        assert (status, body["error"]["code"]) == (404, "alias_not_found")

    async def test_without_the_registry_is_503(self, gateway: Gateway) -> None:
        """Nobody may believe that it was written."""
        gateway.hub.available = False
        assert (await gateway.set("x", "smollm2"))[0] == 503
        assert (await gateway.ask("DELETE", "/v1/aliases/x"))[0] == 503
        assert (await gateway.ask("GET", "/v1/aliases"))[0] == 200


class TestServices:
    async def test_set_listed_and_removed(self, gateway: Gateway) -> None:
        """With the fields that we do not know, and no state while no worker serves it."""
        record = {"base_url": "http://tts:8080", "zone": "b"}
        shape = record | {"id": "team/tts", "object": "service", "name": "team/tts", "metadata_url": "", "state": None}
        assert await gateway.ask("PUT", "/v1/services/team/tts", json=record) == (200, shape)
        assert await gateway.ask("GET", "/v1/services") == (200, {"object": "list", "data": [shape]})
        assert (await gateway.ask("DELETE", "/v1/services/team/tts"))[0] == 200
        status, body = await gateway.ask("DELETE", "/v1/services/team/tts")
        assert (status, body["error"]["code"]) == (404, "service_not_found")
        assert gateway.hub.services == {}

    async def test_state_is_that_of_the_worker_that_serves_it(self, gateway: Gateway) -> None:
        """The best state of several workers; models with the same owner name elsewhere do not count."""
        await gateway.ask("PUT", "/v1/services/tts", json={"base_url": "http://tts:8080"})
        voice = offer("voice", owned_by="tts")
        await gateway.registry.announce(worker("other", voice))
        assert (await gateway.ask("GET", "/v1/services"))[1]["data"][0]["state"] is None
        for state in (WorkerState.UNHEALTHY, WorkerState.READY):
            await gateway.registry.announce(worker(f"w-{state}", voice, state=state, backend="service"))
            assert (await gateway.ask("GET", "/v1/services"))[1]["data"][0]["state"] == state

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "base_url"),
            ({"base_url": ""}, "base_url"),
            ({"base_url": "tts:8080"}, "base_url"),
            ({"base_url": "http://"}, "base_url"),
            ({"base_url": "http://a:99999999"}, "base_url"),
            ({"base_url": "ftp://a"}, "base_url"),
            ({"base_url": "http://a", "metadata_url": "/v1/metadata"}, "metadata_url"),
            ({"base_url": "http://a", "name": "other"}, "name"),
        ],
    )
    async def test_a_wrong_record_is_refused(self, gateway: Gateway, body: dict[str, str], param: str) -> None:
        """400, with the field that is wrong."""
        assert (await gateway.refuses("PUT", "/v1/services/tts", json=body))[:2] == (400, param)
        assert gateway.hub.services == {}


class TestModels:
    async def test_a_model_shows_its_voices_and_its_embeddings_length(self, gateway: Gateway) -> None:
        """Where its offer has them."""
        await gateway.registry.announce(
            worker(
                "w2",
                offer("voice", Capability.SPEECH, voices=("joe", "amy")),
                offer("vectors", Capability.EMBEDDINGS, embedding_length=384),
            )
        )
        assert (await gateway.ask("GET", "/v1/models/voice"))[1]["voices"] == ["joe", "amy"]
        assert (await gateway.ask("GET", "/v1/models/vectors"))[1]["embedding_length"] == 384
        assert "voices" not in (await gateway.ask("GET", "/v1/models/smollm2"))[1]

    async def test_voices_and_speech_models_as_open_webui_reads_them(self, gateway: Gateway) -> None:
        """Only models that speak now, and aliases for them; each voice once."""
        await gateway.registry.announce(
            worker("w2", offer("a", Capability.SPEECH, voices=("joe",)), offer("b", Capability.SPEECH, voices=("joe",)))
        )
        await gateway.set("tts-1", "b")
        assert await gateway.ask("GET", "/v1/audio/voices") == (200, {"voices": [{"id": "joe", "name": "joe"}]})
        status, answer = await gateway.ask("GET", "/v1/audio/models")
        assert (status, [model["id"] for model in answer["models"]]) == (200, ["a", "b", "tts-1"])
        assert answer["data"] == answer["models"]

    async def test_all_of_it_wants_a_key(self, gateway: Gateway) -> None:
        """Reading and writing."""
        gateway.http.headers.pop("authorization")
        for method, path in [
            ("GET", "/v1/aliases"),
            ("PUT", "/v1/aliases/x"),
            ("DELETE", "/v1/aliases/x"),
            ("GET", "/v1/services"),
            ("PUT", "/v1/services/x"),
            ("DELETE", "/v1/services/x"),
            ("GET", "/v1/audio/voices"),
            ("GET", "/v1/audio/models"),
        ]:
            assert (await gateway.ask(method, path))[0] == 401
