"""Endpoints whose requests and answers pass as they are: each row of the table, by every way in which a request can be sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from schemas.endpoints import ENDPOINTS, EndpointSpec
from tests.cluster import KEY, Cluster, Crew
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

EACH = pytest.mark.parametrize("spec", [spec for spec in ENDPOINTS if spec.relayed], ids=lambda spec: str(spec.path))


@pytest.fixture(scope="module")
def crew(shared_crew: Crew) -> Crew:
    """One worker for all tests."""
    return shared_crew


def example(spec: EndpointSpec, crew: Crew) -> dict[str, Any]:
    assert spec.description is not None
    return {**next(iter(spec.description.examples.values())), "model": crew.model}


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@EACH
async def test_now_and_later(cluster: Cluster, crew: Crew, spec: EndpointSpec) -> None:
    """At once, by `Prefer: respond-async`, and through `POST /v1/jobs`: the same answer; a repeated key gives the first one."""
    body = example(spec, crew)
    now = await cluster.post(spec.path, body)
    assert now.status_code == 200, now.text
    assert now.json()["model"] == crew.model
    later = await cluster.http.post(cluster.url + spec.path, json=body, headers={"prefer": "respond-async, wait=20"})
    submitted = await cluster.post("/v1/jobs", {"endpoint": spec.path, "body": body})
    assert submitted.status_code == 202, submitted.text
    job = submitted.json()["id"]
    assert (await cluster.get(f"/v1/jobs/{job}?wait=20")).json()["status"] == "completed"
    result = (await cluster.get(f"/v1/jobs/{job}/result")).json()
    assert without_id(now.json()) == without_id(later.json()) == without_id(result)
    keyed = {"idempotency-key": f"now and later {spec.path}"}
    first, second = [
        (await cluster.http.post(cluster.url + spec.path, json=body, headers=keyed)).json() for _ in range(2)
    ]
    assert first == second


@EACH
async def test_in_a_batch(cluster: Cluster, crew: Crew, spec: EndpointSpec, eventually: Eventually) -> None:
    body = example(spec, crew)
    line = {"custom_id": "a", "method": "POST", "url": spec.path, "body": body}
    file = await cluster.http.post(
        cluster.url + "/v1/files", files={"file": ("in.jsonl", json.dumps(line).encode())}, data={"purpose": "batch"}
    )
    batch = await cluster.post(
        "/v1/batches", {"input_file_id": file.json()["id"], "endpoint": spec.path, "completion_window": "24h"}
    )
    assert batch.status_code == 200, batch.text

    async def ended() -> bool:
        return (await cluster.get(f"/v1/batches/{batch.json()['id']}")).json()["status"] == "completed"

    await eventually(ended)
    output = (await cluster.get(f"/v1/batches/{batch.json()['id']}")).json()["output_file_id"]
    row = json.loads((await cluster.get(f"/v1/files/{output}/content")).text)
    assert row["response"]["status_code"] == 200
    now = (await cluster.post(spec.path, body)).json()
    assert without_id(row["response"]["body"]) == without_id(now)


@EACH
async def test_what_a_model_can_do_is_listed(cluster: Cluster, crew: Crew, spec: EndpointSpec) -> None:
    [listed] = [one for one in (await cluster.get("/v1/models")).json()["data"] if one["id"] == crew.model]
    assert spec.capability in json.dumps(listed)


@EACH
async def test_wrong_requests_are_refused_in_openais_shape(cluster: Cluster, crew: Crew, spec: EndpointSpec) -> None:
    for wrong, param in (({"model": crew.model}, None), (example(spec, crew) | {"stream": True}, "stream")):
        answer = await cluster.post(spec.path, wrong)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert param in (None, error["param"])
    unknown = await cluster.post(spec.path, example(spec, crew) | {"model": "nobody-has-this"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_moderations_of_every_kind_of_input(cluster: Cluster, crew: Crew) -> None:
    """OpenAI's SDK reads the answer: a result for each text, one for the parts of one content; a remote picture is refused."""
    async with AsyncOpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0) as client:
        text = await client.moderations.create(model=crew.model, input="a calm day")
        assert (text.model, len(text.results), text.results[0].flagged) == (crew.model, 1, False)
        assert text.results[0].category_scores.hate_threatening < 0.01
        texts = await client.moderations.create(model=crew.model, input=["peace", "Violence and SELF-HARM!"])
        assert [result.flagged for result in texts.results] == [False, True]
        flagged = texts.results[1].categories
        assert (flagged.violence, flagged.self_harm, flagged.violence_graphic) == (True, True, False)
        picture: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        parts = await client.moderations.create(model=crew.model, input=[{"type": "text", "text": "hate"}, picture])
        [result] = parts.results
        assert result.categories.hate
        assert result.category_applied_input_types.violence == ["text", "image"]
        assert result.category_applied_input_types.hate == ["text"]
    remote = [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}]
    answer = await cluster.post("/v1/moderations", {"model": crew.model, "input": remote})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input.0.image_url")


async def test_moderations_without_a_model(cluster: Cluster, crew: Crew) -> None:
    """The alias `default-moderations` answers; SDKs let the model be left out."""
    set_ = await cluster.http.put(cluster.url + "/v1/aliases/default-moderations", json={"targets": [crew.model]})
    assert set_.is_success, set_.text
    answer = await cluster.post("/v1/moderations", {"input": "a calm day"})
    assert (answer.status_code, answer.json()["model"]) == (200, "default-moderations")
    await cluster.http.delete(cluster.url + "/v1/aliases/default-moderations")
