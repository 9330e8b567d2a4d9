"""InvokeAI 6: images by Stable Diffusion 1.x, 2.x, SDXL and FLUX.1, from a prompt or from another image.

A request becomes a graph for the model's architecture, and one item of InvokeAI's queue for each image. Socket.IO reports the progress of an
item; without events, the queue is polled. InvokeAI's galleries do not change: images and uploads of Nexus are deleted there once the image
is fetched.

Options: `keep_images=true` leaves the images in InvokeAI's gallery; `keep_metadata=true` leaves in images what InvokeAI writes into them. The API
key, where one is configured, is a token of InvokeAI's multi-user mode.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from schemas.descriptors import ModelDescriptor
from schemas.frames import Progress
from schemas.presence import ModelOffer
from workers.adapter_kit.descriptors import DescriptorCache
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
from workers.backends.invokeai.descriptors import describe_model
from workers.backends.invokeai.events import open_listener
from workers.backends.invokeai.graphs import FLUX, MAX_SEED, Graph, ImageSpec, InstalledModel, graph_for, size_for
from workers.backends.invokeai.queue import QueuedBatch

NO_MODELS = "InvokeAI has no model that Nexus can serve. Install a main model (Stable Diffusion 1.x, 2.x, SDXL or FLUX.1) with its Model Manager."
COMMON_FIELDS = ("size", "seed", "steps", "guidance")


class InvokeAIBackend(ImageBackend):
    """Serve the main models of one InvokeAI server. See the module's docstring."""

    name = "invokeai"
    option_names = frozenset({"keep_images", KEEP_METADATA})

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        self._keep_images = parse_flag(config.options, "keep_images")
        self._client = InvokeAIClient(config.url, config.api_key)
        self._descriptors = DescriptorCache()
        self._installed: tuple[InstalledModel, ...] = ()
        self._served: dict[str, InstalledModel] | None = None
        """Models by name, also those that lack a part; None before the first `discover`."""

    async def close(self) -> None:
        await self._client.close()

    def requirements(self) -> tuple[Requirement, ...]:
        """Return Pillow, for masks and formats, and Socket.IO, for previews and percentages only."""
        return (PILLOW, Library("socketio", "python-socketio", "previews and percentages", "images", optional=True))

    async def discover(self) -> Discovery:
        """Return the main models that there is a graph for, or those of `config.models`. Of two with one name, the second is named by its key.

        A FLUX model whose other parts are missing is a problem. Raises BackendError when there is no model to serve.
        """
        try:
            records = await self._client.models()
        except BackendError as error:
            raise _unavailable(error) from error
        self._installed = tuple(InstalledModel.of(record) for record in records)
        served: dict[str, InstalledModel] = {}
        for model in self._installed:
            if model.served:
                served[model.key if model.name in served else model.name] = model
        problems = self.missing_models("InvokeAI", served)
        self._served = {name: served[name] for name in self.config.models or served if name in served}
        faults = {name: self._model_fault(model) for name, model in self._served.items()}
        problems += [
            f"The model {name!r} is not served: {fault}" for name, fault in faults.items() if fault is not None
        ]
        usable = [name for name, fault in faults.items() if fault is None]
        if not usable:
            raise BackendError(". ".join(problems) or NO_MODELS)
        return image_discovery(dict.fromkeys(usable), problems)

    def _model_fault(self, model: InstalledModel) -> str | None:
        """Return why InvokeAI cannot run an installed model; None where it can."""
        try:
            width, height = model.side
            graph_for(model, ImageSpec("", width=width, height=height), self._installed)
        except BackendRefused as error:
            return str(error)
        return None

    def describe(self, offer: ModelOffer) -> ModelDescriptor:
        """Return what an installed model can be told."""
        model = (self._served or {})[offer.name]
        return self._descriptors.get(offer.name, model, lambda: describe_model(model))

    async def health(self) -> None:
        """Poll `/api/v1/app/version`."""
        try:
            await self._client.version()
        except BackendError as error:
            raise _unavailable(error) from error

    async def start_request(self, task: Task) -> tuple[ImageRequest, AsyncGenerator[Progress | GeneratedImage]]:
        """Check a task, and return it with its images as they are made. Raises BackendRefused, ModelNotServed."""
        model = await self._find_model(task.model)
        request = ImageRequest.from_task(task)
        _check_request(request, model)
        return request, self._generate(request, model)

    async def run_graph(self, graph: Graph, seeds: Sequence[int]) -> AsyncGenerator[Progress | GeneratedImage]:
        """Yield one image for each seed, by any graph. Closing the generator stops InvokeAI, and returns when it has stopped."""
        name = uuid.uuid4().hex
        async with open_listener(self.config.url, self.config.api_key, name) as listener:
            batch = QueuedBatch(name, self._client, listener, graph, seeds, keep=self._keep_images)
            async with aclosing(batch.outputs()) as outputs:
                async for output in outputs:
                    yield output

    async def _find_model(self, name: str) -> InstalledModel:
        """Return a served model. Raises ModelNotServed: InvokeAI would accept any key, and fail later."""
        if self._served is None:
            await self.discover()
        model = (self._served or {}).get(name)
        if model is None:
            raise ModelNotServed(f"InvokeAI does not have the model {name!r}", param="model")
        return model

    async def _generate(
        self, request: ImageRequest, model: InstalledModel
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        uploads: list[str] = []
        try:
            graph = graph_for(model, await self._image_spec(request, model, uploads), self._installed)
            async with aclosing(self.run_graph(graph, _seeds(request))) as outputs:
                async for output in outputs:
                    yield output
        finally:
            with suppress(BackendError):
                await self._client.delete_images(uploads)

    async def _image_spec(self, request: ImageRequest, model: InstalledModel, uploads: list[str]) -> ImageSpec:
        """Return the spec of the images. Names of uploads are added to `uploads`."""
        size = (request.width, request.height) if request.width and request.height else None
        width, height = size_for(model, size, None)
        spec = ImageSpec(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or "",
            width=width,
            height=height,
            steps=request.steps,
            guidance=request.guidance,
            strength=request.strength,
        )
        if not request.edit:
            return spec
        graph_for(model, spec, self._installed)  # reports missing parts before anything is uploaded
        image, own_size = await self._client.upload(request.images[0])
        uploads.append(image)
        width, height = size_for(model, size, own_size)
        mask = None
        if request.mask is not None:
            mask, _ = await self._client.upload(await _edit_area_file(request.mask))
            uploads.append(mask)
        return replace(spec, width=width, height=height, image=image, mask=mask)


def _unavailable(error: BackendError) -> BackendError:
    return BackendUnavailable(str(error)) if error.transient else error


def _check_request(request: ImageRequest, model: InstalledModel) -> None:
    """Raise BackendRefused for a field that the model's graph cannot honor."""
    supported = [*COMMON_FIELDS, "edit"]
    if request.edit and not model.kontext:
        supported += ["strength", "mask"]
    if model.base != FLUX:
        supported.append("negative_prompt")
    if model.variant == "schnell":
        supported.remove("guidance")
    request.require_supported(*supported)
    if request.guidance is not None and request.guidance < 1:
        raise BackendRefused("InvokeAI's guidance is 1 or more.", param="guidance")
    if request.seed is not None and request.seed > MAX_SEED:
        raise BackendRefused(f"The seed is too large. InvokeAI's seeds go from 0 to {MAX_SEED}.", param="seed")


def _seeds(request: ImageRequest) -> list[int]:
    first = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
    return [(first + index) % (MAX_SEED + 1) for index in range(request.n)]


async def _edit_area_file(mask: UploadedFile) -> UploadedFile:
    """Return the mask in the form of InvokeAI's graph."""
    data = await make_edit_mask(await mask.read())

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return UploadedFile("mask", "mask.png", "image/png", len(data), pieces)
