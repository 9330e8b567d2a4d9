"""The base of adapters for image servers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from contextlib import aclosing

from schemas.frames import Progress
from schemas.jobs import Capability
from schemas.presence import ModelOffer
from workers.adapter_kit.images.responses import GeneratedImage, ImageRequest, parse_keep_metadata, respond_with_images
from workers.backends.base import Backend, BackendConfig, Discovery, Output, Task


class ImageBackend(Backend):
    """Serve an image server that works on one request at a time.

    The option `keep_metadata=true` leaves in images what the server writes into them; a subclass adds it to its `option_names`.
    """

    default_slots = 1

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        self._keep_metadata = parse_keep_metadata(config.options)

    @abstractmethod
    async def start_request(self, task: Task) -> tuple[ImageRequest, AsyncGenerator[Progress | GeneratedImage]]:
        """Check a task, and return it with its images as they are made. Raises BackendRefused, ModelNotServed.

        Closing the generator MUST stop the server's work.
        """

    async def run(self, task: Task) -> AsyncGenerator[Output]:
        """Generate or edit images."""
        request, images = await self.start_request(task)
        response = respond_with_images(task, request, images, keep_metadata=self._keep_metadata)
        async with aclosing(response) as outputs:
            async for output in outputs:
                yield output

    def missing_models(self, server: str, available: Collection[str]) -> list[str]:
        """Return a problem that names the configured models that `server` lacks; nothing where it has all of them."""
        missing = [name for name in self.config.models if name not in available]
        return [f"{server} lacks {', '.join(missing)}; it has {', '.join(available) or 'no models'}"] if missing else []


def image_discovery(models: Mapping[str, bool | None], problems: Iterable[str]) -> Discovery:
    """Return the discovery of image models. `models`: whether the server holds each in memory, None where it does not report it."""
    offers = (
        ModelOffer(name=name, capabilities=(Capability.IMAGES,), loaded=loaded) for name, loaded in models.items()
    )
    return Discovery(tuple(offers), slots=1, problems=tuple(problems))
