"""Aliases as callers meet them: a name that is served by whatever operators say, from one request to the next."""

from __future__ import annotations

import json

import httpx
import pytest

from backbone.registry.etcd_client import EtcdClient
from tests.cluster import Cluster, Crew, Recorded
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def put(cluster: Cluster, alias: str, *targets: str) -> httpx.Response:
    return await cluster.http.put(f"{cluster.url}/v1/aliases/{alias}", json={"targets": targets})


async def listed(cluster: Cluster) -> dict[str, str | None]:
    """The aliases among the models, and what each resolves to."""
    models = (await cluster.get("/v1/models")).json()["data"]
    return {model["id"]: model["resolves_to"] for model in models if "alias_for" in model}


async def server_of(cluster: Cluster, eventually: Eventually, answer: Recorded) -> str:
    """The model that a request's job was for, by the gateway's log."""
    assert (await answer.end()).status == 200, answer.body
    assert answer.headers is not None
    job = answer.headers["x-nexus-job-id"]
    return str((await eventually(lambda: [one for one in cluster.requests() if one.get("job") == job]))[0]["model"])


async def test_a_changed_alias_moves_requests_to_another_model(
    cluster: Cluster, crew: Crew, eventually: Eventually
) -> None:
    """The next request after the change goes there; answers carry the name that was asked for, streamed or not."""
    alias, one, other = f"{crew.model}/alias:x", f"{crew.model}-1", f"{crew.model}-2"
    for model in (one, other):
        await crew.start(WORKER_MODELS=model)
    for model in (one, other, one):
        assert (await put(cluster, alias, model)).status_code == 200
        assert (await listed(cluster))[alias] == model
        assert (await cluster.get(f"/v1/models/{alias}")).json()["resolves_to"] == model
        whole, streamed = crew.ask(model=alias), crew.stream(model=alias)
        assert await server_of(cluster, eventually, whole) == model
        assert await server_of(cluster, eventually, streamed) == model
        assert json.loads(whole.body)["model"] == alias
        assert {json.loads(line)["model"] for line in streamed.lines if line != "[DONE]"} == {alias}
    assert (await cluster.http.delete(f"{cluster.url}/v1/aliases/{alias}")).status_code == 200
    gone = await crew.ask(model=alias).end()
    assert gone.status == 404
    assert gone.error is not None
    assert gone.error["code"] == "model_not_found"


async def test_an_alias_that_is_typed_into_etcd(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """No gateway is asked; every gateway follows."""
    await crew.start()
    alias = f"{crew.model}/typed"
    link = EtcdClient(cluster.etcd.url, probe_key="probe")
    await link.open()
    await link.put(f"/nexus/aliases/{alias}", json.dumps(crew.model).encode())
    await link.close()
    await eventually(lambda: _resolves(cluster, alias, crew.model))
    assert await server_of(cluster, eventually, crew.ask(model=alias)) == crew.model


async def test_the_next_target_serves_while_the_first_is_away(
    cluster: Cluster, crew: Crew, eventually: Eventually
) -> None:
    """The first target's worker leaves, and comes back; without any the request is 503, and the alias is not listed."""
    alias, first, second = f"{crew.model}-alias", f"{crew.model}-1", f"{crew.model}-2"
    workers = {model: await crew.start(WORKER_MODELS=model) for model in (first, second)}
    await put(cluster, alias, first, second)
    assert await server_of(cluster, eventually, crew.ask(model=alias)) == first

    await cluster.stop_workers(workers[first])
    await eventually(lambda: _resolves(cluster, alias, second))
    assert await server_of(cluster, eventually, crew.ask(model=alias)) == second

    await crew.start(WORKER_MODELS=first)
    await eventually(lambda: _resolves(cluster, alias, first))
    assert await server_of(cluster, eventually, crew.ask(model=alias)) == first

    await cluster.stop_workers(*crew.names)
    await eventually(lambda: _resolves(cluster, alias, None))
    refused = await crew.ask(model=alias).end()
    assert refused.status == 503
    assert refused.error is not None
    assert f"'{first}', '{second}'" in refused.error["message"]
    aliases = {one["id"]: one for one in (await cluster.get("/v1/aliases")).json()["data"]}
    assert aliases[alias]["resolves_to"] is None


async def _resolves(cluster: Cluster, alias: str, model: str | None) -> bool:
    return (await listed(cluster)).get(alias) == model
