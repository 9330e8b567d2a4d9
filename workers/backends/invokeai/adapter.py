"""InvokeAI 6: pictures by Stable Diffusion 1.x, 2.x, SDXL and FLUX.1, made from a prompt or from a picture.

A request becomes a graph for the model's architecture, and one item of InvokeAI's queue per picture. Socket.IO says how far an item
is; where it says nothing, the queue is asked. InvokeAI's galleries stay as they are: what is made for Nexus is deleted there once it is
fetched, uploads included.

Options: `keep_images=true` leaves the results in InvokeAI's gallery; `keep_metadata=true` leaves in pictures what InvokeAI writes into
them. The API key, where one is configured, is a token of InvokeAI's multi-user mode.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from schemas.frames import Progress
from workers.adapter_kit.images.backend import ImageBackend, image_discovery
from workers.adapter_kit.images.responses import (
    KEEP_METADATA,
    GeneratedImage,
    ImageRequest,
    make_edit_mask,
)
from workers.adapter_kit.options import parse_flag
from workers.adapter_kit.requirements import PILLOW, Library
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Discovery,
    ModelNotServed,
    Requirement,
    Task,
    UploadedFile,
)
from workers.backends.invokeai.client import InvokeAIClient
from workers.backends.invokeai.events import listening
from workers.backends.invokeai.graphs import FLUX, MAX_SEED, Graph, ImageSpec, InstalledModel, graph_for, size_for
from workers.backends.invokeai.queue import QueuedBatch

NO_MODELS = "InvokeAI has no model that Nexus can serve. Install a main model (Stable Diffusion 1.x, 2.x, SDXL or FLUX.1) with its Model Manager."
HONOURED = ("size", "seed", "steps", "guidance")


class InvokeAIBackend(ImageBackend):
    """See the module's docstring."""

    name = "invokeai"
    option_names = frozenset({"keep_images", KEEP_METADATA})

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError when the URL or an option makes no sense."""
        super().__init__(config)
        self._keep_images = parse_flag(config.options, "keep_images")
        self._api = InvokeAIClient(config.url, config.api_key)
        self._installed: tuple[InstalledModel, ...] = ()
        self._served: dict[str, InstalledModel] | None = None
        """By their names, also those that lack a part; None before the first `discover`."""

    async def close(self) -> None:
        await self._api.close()

    def requirements(self) -> tuple[Requirement, ...]:
        """Pillow for masks and formats; Socket.IO is only for previews and percentages."""
        return (PILLOW, Library("socketio", "python-socketio", "previews and percentages", "images", optional=True))

    async def discover(self) -> Discovery:
        """The main models that there is a graph for, or those of `config.models`. Of two with one name, the second goes by its key.

        A FLUX model whose other parts are missing is a problem. Raises BackendError when there is no model to serve.
        """
        try:
            records = await self._api.models()
        except BackendError as error:
            raise _away(error) from error
        self._installed = tuple(InstalledModel.of(record) for record in records)
        served: dict[str, InstalledModel] = {}
        for model in self._installed:
            if model.served:
                served[model.key if model.name in served else model.name] = model
        problems = self.missing_models("InvokeAI", served)
        self._served = {name: served[name] for name in self.config.models or served if name in served}
        faults = {name: self._fault(model) for name, model in self._served.items()}
        problems += [
            f"The model {name!r} is not served: {fault}" for name, fault in faults.items() if fault is not None
        ]
        usable = [name for name, fault in faults.items() if fault is None]
        if not usable:
            raise BackendError(". ".join(problems) or NO_MODELS)
        return image_discovery(dict.fromkeys(usable), problems)

    def _fault(self, model: InstalledModel) -> str | None:
        """What keeps InvokeAI from running an installed model."""
        try:
            width, height = model.side
            graph_for(model, ImageSpec("", width=width, height=height), self._installed)
        except BackendRefused as error:
            return str(error)
        return None

    async def health(self) -> None:
        """`GET /api/v1/app/version`."""
        try:
            await self._api.version()
        except BackendError as error:
            raise _away(error) from error

    async def start_request(self, task: Task) -> tuple[ImageRequest, AsyncGenerator[Progress | GeneratedImage]]:
        """Check a task, and return it with its images as they are made. Raises BackendRefused, ModelNotServed."""
        model = await self._model(task.model)
        request = ImageRequest.from_task(task)
        _check(request, model)
        return request, self._pictures(request, model)

    async def run_graph(self, graph: Graph, seeds: Sequence[int]) -> AsyncGenerator[Progress | GeneratedImage]:
        """One picture per seed, by any graph. Closing this stops InvokeAI, and returns when it has stopped."""
        name = uuid.uuid4().hex
        async with listening(self.config.url, self.config.api_key, name) as listener:
            batch = QueuedBatch(name, self._api, listener, graph, seeds, keep=self._keep_images)
            async with aclosing(batch.outputs()) as outputs:
                async for output in outputs:
                    yield output

    async def _model(self, name: str) -> InstalledModel:
        """InvokeAI would accept any key, and fail later."""
        if self._served is None:
            await self.discover()
        model = (self._served or {}).get(name)
        if model is None:
            raise ModelNotServed(f"InvokeAI does not have the model {name!r}", param="model")
        return model

    async def _pictures(
        self, request: ImageRequest, model: InstalledModel
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        uploads: list[str] = []
        try:
            graph = graph_for(model, await self._wanted(request, model, uploads), self._installed)
            async with aclosing(self.run_graph(graph, _seeds(request))) as outputs:
                async for output in outputs:
                    yield output
        finally:
            with suppress(BackendError):
                await self._api.discard(uploads)

    async def _wanted(self, request: ImageRequest, model: InstalledModel, uploads: list[str]) -> ImageSpec:
        """What the graph is to make. Names of what is uploaded are added to `uploads`."""
        asked = (request.width, request.height) if request.width and request.height else None
        width, height = size_for(model, asked, None)
        wanted = ImageSpec(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or "",
            width=width,
            height=height,
            steps=request.steps,
            guidance=request.guidance,
            strength=request.strength,
        )
        if not request.edit:
            return wanted
        graph_for(model, wanted, self._installed)  # what is missing is said before anything is uploaded
        image, own_size = await self._api.upload(request.images[0])
        uploads.append(image)
        width, height = size_for(model, asked, own_size)
        mask = None
        if request.mask is not None:
            mask, _ = await self._api.upload(await _area(request.mask))
            uploads.append(mask)
        return replace(wanted, width=width, height=height, image=image, mask=mask)


def _away(error: BackendError) -> BackendError:
    return BackendUnavailable(str(error)) if error.transient else error


def _check(request: ImageRequest, model: InstalledModel) -> None:
    """Refuse what the model's graph cannot honour."""
    honoured = [*HONOURED, "edit"]
    if request.edit and not model.kontext:
        honoured += ["strength", "mask"]
    if model.base != FLUX:
        honoured.append("negative_prompt")
    if model.variant == "schnell":
        honoured.remove("guidance")
    request.require_supported(*honoured)
    if request.guidance is not None and request.guidance < 1:
        raise BackendRefused("InvokeAI takes a guidance of 1 or more", param="guidance")
    if request.seed is not None and request.seed > MAX_SEED:
        raise BackendRefused(f"InvokeAI's seeds go from 0 to {MAX_SEED}", param="seed")


def _seeds(request: ImageRequest) -> list[int]:
    first = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
    return [(first + index) % (MAX_SEED + 1) for index in range(request.n)]


async def _area(mask: UploadedFile) -> UploadedFile:
    """The mask as InvokeAI's graph wants it."""
    data = await make_edit_mask(await mask.read())

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return UploadedFile("mask", "mask.png", "image/png", len(data), pieces)
