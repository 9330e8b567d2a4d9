"""A batch in InvokeAI's queue, from enqueueing to its last image, or to the end of a canceled one.

| state | meaning |
|---|---|
| pending, waiting | waits in line: `Progress(phase="queued")` |
| in_progress | runs |
| completed | its session names the image |
| failed | `error_type` and `error_message` tell why; also for faults that no check finds before, such as an unknown model |
| canceled | by this adapter, by a user of InvokeAI's page, or by InvokeAI's restart |
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

FINAL_STATES = frozenset({"completed", "failed", "canceled"})
WAITING_STATES = frozenset({"pending", "waiting"})
POLL_INTERVAL_WITH_EVENTS_S = 5.0
"""How often the queue is polled while events arrive: one may be lost."""
POLL_INTERVAL_S = 0.5
STOP_POLL_INTERVAL_S = 0.1
NO_MEMORY = ("out of memory", "outofmemory", "not enough memory", "allocate memory")
UNKNOWN_MODEL = ("unknown model", "unknownmodel", "modelnotfound")
REFUSED_ERROR_TYPES = frozenset({"NodeInputError", "ValidationError", "RequestValidationError"})


class QueuedBatch:
    """A batch of one graph, with one image for each seed."""

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
        self._client = api
        self._listener = listener
        self._graph = graph
        self._seeds = seeds
        self._keep = keep
        self._items: list[int] = []
        self._ended: set[int] = set()
        self._state: JSON = {}
        """The followed item at the last poll."""
        self._completed = 0
        self._models_loaded = False
        """Whether the models are loaded, since a percentage was reported."""

    async def outputs(self) -> AsyncGenerator[Progress | GeneratedImage]:
        """Yield progress, previews, and the images in the order of the seeds. Closing the generator returns when InvokeAI has stopped."""
        try:
            await self._enqueue()
            for index, item in enumerate(self._items):
                async with aclosing(self._follow(item)) as following:
                    async for output in following:
                        yield output
                try:
                    data, content_type = await self._client.image(self._result())
                finally:
                    await self._delete_images(self._state)
                self._completed += 1
                yield GeneratedImage(data, content_type, seed=self._seeds[index], index=index)
        finally:
            with suppress(BackendError):  # the reason of the end was raised already
                await self._stop()

    async def _enqueue(self) -> None:
        """Queue the items. A cancellation meanwhile does not lose their ids."""
        body = self._graph.batch(self._name, self._seeds, keep=self._keep)
        sending = asyncio.ensure_future(self._client.enqueue(body, len(self._seeds)))
        try:
            self._items = await asyncio.shield(sending)
        except asyncio.CancelledError:
            with suppress(BackendError):
                self._items = await sending
            raise

    async def _follow(self, item: int) -> AsyncGenerator[Progress | GeneratedImage]:
        """Yield the progress of an item until it is completed. Raises BackendError when it ends in another way."""
        while True:
            await self._poll(item)
            status = self._state["status"]
            if status in FINAL_STATES:
                self._ended.add(item)
                if status == "completed":
                    return
                await self._delete_images(self._state)
                raise self._error(self._state)
            if status in WAITING_STATES:
                yield Progress(phase="queued")
            elif not self._listener.connected:
                yield Progress()  # a sign of life
            while event := await self._listener.next_progress(
                POLL_INTERVAL_WITH_EVENTS_S if self._listener.connected else POLL_INTERVAL_S
            ):
                for output in self._report_progress(event):
                    yield output

    async def _poll(self, item: int) -> None:
        try:
            self._state = await self._client.item(item)
        except BackendRefused as error:
            self._ended.add(item)
            raise BackendError("The item was deleted from InvokeAI's queue.") from error

    def _report_progress(self, event: JSON) -> Iterator[Progress | GeneratedImage]:
        """Yield the progress of an `invocation_progress` event: some nodes report a percentage, and few an image."""
        share, message = event.get("percentage"), str(event.get("message") or "")
        self._models_loaded = self._models_loaded or share is not None
        loading = not self._models_loaded and message.startswith("Loading model")
        url = (event.get("image") or {}).get("dataURL") or ""
        yield Progress(
            phase="load" if loading else "run",
            fraction=None if share is None else (self._completed + share) / len(self._seeds),
            message=message or None,
            preview=url if 0 < len(url) <= MAX_PREVIEW else None,
        )
        head, _, data = url.partition(";base64,")
        if data and event.get("item_id") in self._items:
            with suppress(binascii.Error):
                index = self._items.index(event["item_id"])
                yield GeneratedImage(base64.b64decode(data), head.removeprefix("data:"), final=False, index=index)

    def _result(self) -> str:
        session = self._state["session"]
        prepared = session["source_prepared_mapping"].get(self._graph.output) or [""]
        result = session["results"].get(prepared[0]) or {}
        if result.get("type") != "image_output":
            raise BackendError("InvokeAI completed the item without an image.")
        return str(result["image"]["image_name"])

    async def _delete_images(self, state: JSON) -> None:
        """Delete the item's images in InvokeAI, except a result that the operator keeps."""
        session = state["session"]
        prepared = session["source_prepared_mapping"].get(self._graph.output, ()) if self._keep else ()
        pictures = {
            name for node, result in session["results"].items() if node not in prepared for name in _image_names(result)
        }
        with suppress(BackendError):
            await self._client.delete_images(sorted(pictures))

    def _error(self, state: JSON) -> BackendError:
        if state["status"] == "canceled":
            # InvokeAI cancels running items when it restarts, which is transient; a user who cancels is not.
            return BackendError("The item was canceled in InvokeAI.", transient=self._listener.lost)
        return error_from_item(str(state.get("error_type") or ""), str(state.get("error_message") or ""))

    async def _stop(self) -> None:
        """Cancel the items that have not ended, and wait until InvokeAI has stopped."""
        cancelled: list[JSON] = []
        for item in self._items:
            if item not in self._ended:
                with suppress(BackendRefused):  # deleted meanwhile
                    cancelled.append(await self._client.cancel(item))
        if not any(state.get("started_at") for state in cancelled):
            return
        while await self._client.is_winding_down():
            await asyncio.sleep(STOP_POLL_INTERVAL_S)
        for state in cancelled:
            await self._delete_images(await self._client.item(state["item_id"]))


def error_from_item(kind: str, message: str) -> BackendError:
    """Return the error of a failed item."""
    text = f"InvokeAI failed: {kind}: {message}" if kind else f"InvokeAI failed: {message}"
    message = text.lower()
    if any(word in message for word in NO_MEMORY):
        return BackendError(text, transient=True)
    if any(word in message for word in UNKNOWN_MODEL):
        return ModelNotServed(text, param="model")
    if kind in REFUSED_ERROR_TYPES:
        return BackendRefused(text)
    return BackendError(text)


def _image_names(result: JSON) -> Iterator[str]:
    """Yield the image names in a node's result, in any field."""
    for value in result.values():
        if isinstance(value, dict) and isinstance(value.get("image_name"), str):
            yield value["image_name"]
