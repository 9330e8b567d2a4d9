"""A batch in InvokeAI's queue, from enqueueing to the last picture, or to the end of what was cancelled.

| state | means |
|---|---|
| pending, waiting | in line: `Progress(phase="queued")` |
| in_progress | being made |
| completed | its session names the picture |
| failed | `error_type` and `error_message` say why; also for what no check could find before, such as an unknown model |
| canceled | by us, by somebody at InvokeAI's page, or by its restart |
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from schemas.frames import MAX_PREVIEW, Progress
from workers.adapter_kit.images.responses import GeneratedImage
from workers.backends.base import BackendError, BackendRefused, ModelNotServed
from workers.backends.invokeai.client import InvokeAIClient
from workers.backends.invokeai.events import InvokeAIListener
from workers.backends.invokeai.graphs import Graph

JSON = dict[str, Any]

ENDED = frozenset({"completed", "failed", "canceled"})
WAITING = frozenset({"pending", "waiting"})
HEARING_POLL_S = 5.0
"""How often the queue is asked although Socket.IO speaks: an event may be lost."""
DEAF_POLL_S = 0.5
STOP_POLL_S = 0.1
NO_MEMORY = ("out of memory", "outofmemory", "not enough memory", "allocate memory")
UNKNOWN_MODEL = ("unknown model", "unknownmodel", "modelnotfound")
REFUSED = frozenset({"NodeInputError", "ValidationError", "RequestValidationError"})


class QueuedBatch:
    """One picture per seed, by one graph."""

    def __init__(
        self,
        name: str,
        api: InvokeAIClient,
        listener: InvokeAIListener,
        graph: Graph,
        seeds: Sequence[int],
        *,
        keep: bool,
    ) -> None:
        self._name = name
        self._api = api
        self._listener = listener
        self._graph = graph
        self._seeds = seeds
        self._keep = keep
        self._items: list[int] = []
        self._ended: set[int] = set()
        self._state: JSON = {}
        """The item that is followed, as InvokeAI last described it."""
        self._made = 0
        self._began = False
        """The models are loaded: something was said of how far it is."""

    async def outputs(self) -> AsyncGenerator[Progress | GeneratedImage]:
        """Progress, previews, and the pictures in the order of the seeds. Closing this returns when InvokeAI has stopped."""
        try:
            await self._enqueue()
            for index, item in enumerate(self._items):
                async with aclosing(self._follow(item)) as following:
                    async for output in following:
                        yield output
                try:
                    data, content_type = await self._api.picture(self._result())
                finally:
                    await self._discard(self._state)
                self._made += 1
                yield GeneratedImage(data, content_type, seed=self._seeds[index], index=index)
        finally:
            with suppress(BackendError):  # there is nothing more to be done, and why it ended has been said
                await self._stop()

    async def _enqueue(self) -> None:
        """Fill `_items`. Being cancelled meanwhile does not lose what has come into the queue."""
        body = self._graph.batch(self._name, self._seeds, keep=self._keep)
        sending = asyncio.ensure_future(self._api.enqueue(body, len(self._seeds)))
        try:
            self._items = await asyncio.shield(sending)
        except asyncio.CancelledError:
            with suppress(BackendError):
                self._items = await sending
            raise

    async def _follow(self, item: int) -> AsyncGenerator[Progress | GeneratedImage]:
        """Until the item is completed. Raises BackendError when it ends in another way."""
        while True:
            await self._ask(item)
            status = self._state["status"]
            if status in ENDED:
                self._ended.add(item)
                if status == "completed":
                    return
                await self._discard(self._state)
                raise self._failure(self._state)
            if status in WAITING:
                yield Progress(phase="queued")
            elif not self._listener.live:
                yield Progress()  # nothing else would say that the work goes on
            while news := await self._listener.news(HEARING_POLL_S if self._listener.live else DEAF_POLL_S):
                for output in self._tell(news):
                    yield output

    async def _ask(self, item: int) -> None:
        try:
            self._state = await self._api.item(item)
        except BackendRefused as error:
            self._ended.add(item)
            raise BackendError("the job was deleted from InvokeAI's queue") from error

    def _tell(self, news: JSON) -> Iterator[Progress | GeneratedImage]:
        """An `invocation_progress` event: some nodes say a percentage, and few a picture."""
        share, message = news.get("percentage"), str(news.get("message") or "")
        self._began = self._began or share is not None
        loading = not self._began and message.startswith("Loading model")
        url = (news.get("image") or {}).get("dataURL") or ""
        yield Progress(
            phase="load" if loading else "run",
            fraction=None if share is None else (self._made + share) / len(self._seeds),
            message=message or None,
            preview=url if 0 < len(url) <= MAX_PREVIEW else None,
        )
        head, _, data = url.partition(";base64,")
        if data and news.get("item_id") in self._items:
            with suppress(binascii.Error):
                index = self._items.index(news["item_id"])
                yield GeneratedImage(base64.b64decode(data), head.removeprefix("data:"), final=False, index=index)

    def _result(self) -> str:
        session = self._state["session"]
        prepared = session["source_prepared_mapping"].get(self._graph.output) or [""]
        result = session["results"].get(prepared[0]) or {}
        if result.get("type") != "image_output":
            raise BackendError("InvokeAI completed the job without a picture")
        return str(result["image"]["image_name"])

    async def _discard(self, state: JSON) -> None:
        """Delete what the item has left in InvokeAI, but for a result that is to be kept."""
        session = state["session"]
        kept = session["source_prepared_mapping"].get(self._graph.output, ()) if self._keep else ()
        pictures = {name for node, result in session["results"].items() if node not in kept for name in _names(result)}
        with suppress(BackendError):
            await self._api.discard(sorted(pictures))

    def _failure(self, state: JSON) -> BackendError:
        if state["status"] == "canceled":
            # InvokeAI cancels what it was at when it starts again; somebody who cancels there means it.
            return BackendError("the job was cancelled in InvokeAI", transient=self._listener.lost)
        return failure(str(state.get("error_type") or ""), str(state.get("error_message") or ""))

    async def _stop(self) -> None:
        """Cancel what has not ended, and wait until InvokeAI is done with it."""
        cancelled: list[JSON] = []
        for item in self._items:
            if item not in self._ended:
                with suppress(BackendRefused):  # deleted there meanwhile
                    cancelled.append(await self._api.cancel(item))
        if not any(state.get("started_at") for state in cancelled):
            return
        while await self._api.winding_down():
            await asyncio.sleep(STOP_POLL_S)
        for state in cancelled:
            await self._discard(await self._api.item(state["item_id"]))


def failure(kind: str, message: str) -> BackendError:
    """What a failed item means."""
    text = f"InvokeAI failed: {kind}: {message}" if kind else f"InvokeAI failed: {message}"
    said = text.lower()
    if any(word in said for word in NO_MEMORY):
        return BackendError(text, transient=True)
    if any(word in said for word in UNKNOWN_MODEL):
        return ModelNotServed(text, param="model")
    if kind in REFUSED:
        return BackendRefused(text)
    return BackendError(text)


def _names(result: JSON) -> Iterator[str]:
    """Pictures that a node's result names, in whichever field."""
    for value in result.values():
        if isinstance(value, dict) and isinstance(value.get("image_name"), str):
            yield value["image_name"]
