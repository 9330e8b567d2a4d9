"""The naive baseline: what an afternoon gives with FastAPI, nats-py, JetStream and httpx. It works; it is not tuned.

    python -m bench.naive gateway    # PORT, NATS_URL
    python -m bench.naive worker     # BACKEND_URL, NATS_URL

A request is published to a work queue, its answer comes on an inbox of its own, piece by piece, and ends with an empty
message. No keys, no limits, no cancellation, no redelivery rules, no metrics.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import nats
import uvicorn
import uvloop
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from nats.aio.msg import Msg
from nats.js.api import RetentionPolicy
from pydantic import BaseModel, ConfigDict

STREAM, SUBJECT = "NAIVE", "naive.jobs"
BATCH = 64
SLOTS = 1024
TIMEOUT_S = 60


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message]
    stream: bool = False
    max_tokens: int | None = None


def make_app() -> FastAPI:
    bus: dict[str, Any] = {}

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        nc = bus["nc"] = await nats.connect(os.environ["NATS_URL"])
        js = bus["js"] = nc.jetstream()
        await js.add_stream(name=STREAM, subjects=[SUBJECT], retention=RetentionPolicy.WORK_QUEUE)
        yield
        await nc.close()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Response:
        nc, js = bus["nc"], bus["js"]
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        await js.publish(SUBJECT, request.model_dump_json(exclude_none=True).encode(), headers={"Reply": inbox})

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while data := (await answers.next_msg(timeout=TIMEOUT_S)).data:
                    yield data
            finally:
                await answers.unsubscribe()

        if request.stream:
            return StreamingResponse(pieces(), media_type="text/event-stream")
        body = b"".join([piece async for piece in pieces()])
        return Response(body, media_type="application/json")

    return app


async def work() -> None:
    nc = await nats.connect(os.environ["NATS_URL"])
    jobs = await nc.jetstream().pull_subscribe(SUBJECT, durable="worker")
    url = os.environ["BACKEND_URL"] + "/v1/chat/completions"
    slots = asyncio.Semaphore(SLOTS)
    running: set[asyncio.Task[None]] = set()
    limits = httpx.Limits(max_connections=SLOTS, max_keepalive_connections=SLOTS)

    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:

        async def run(job: Msg) -> None:
            async with slots:
                reply = (job.headers or {})["Reply"]
                headers = {"content-type": "application/json"}
                async with client.stream("POST", url, content=job.data, headers=headers) as response:
                    async for piece in response.aiter_raw():
                        await nc.publish(reply, piece)
                await nc.publish(reply, b"")
                await job.ack()

        while True:
            try:
                fetched = await jobs.fetch(BATCH, timeout=5)
            except TimeoutError:
                continue
            for job in fetched:
                task = asyncio.create_task(run(job))
                running.add(task)
                task.add_done_callback(running.discard)


if __name__ == "__main__":
    if sys.argv[1:] == ["gateway"]:
        uvicorn.run(make_app(), host="127.0.0.1", port=int(os.environ["PORT"]), access_log=False)
    else:
        uvloop.run(work())
