"""AUTOMATIC1111's API: stable-diffusion-webui (started with `--api`), Forge, and the server of stable-diffusion.cpp.

A checkpoint is a model. Each image of a request is a call of its own, one after the other: all of these servers can do that, each image is sent
as soon as it is made, and its seed is known. While a call runs, `progress` reports how far it is, on servers that have that route. A call that
is cancelled is interrupted, and awaited: these servers do not notice that their caller disconnects.

A request may also name one of the server's samplers, schedulers and LoRAs: see choices.py.

Options: `steps` and `size`, for requests without them; `keep_metadata=true` leaves in images what the server writes into them. The key may be
`USER:PASSWORD` (`--api-auth`).
"""

from __future__ import annotations

import asyncio
import base64
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from time import monotonic
from typing import Any

import orjson

from schemas.descriptors import EndpointDescriptor, ModelDescriptor
from schemas.frames import Progress
from schemas.parameters import images
from schemas.parameters.images import PictureOptions
from schemas.presence import ModelOffer
from workers.adapter_kit.descriptors import DescriptorCache
from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import BackendResponse, HttpClient
from workers.adapter_kit.images.backend import ImageBackend, image_discovery
from workers.adapter_kit.images.responses import (
    KEEP_METADATA,
    GeneratedImage,
    ImageRequest,
    authorization_header,
    detect_content_type,
    make_edit_mask,
    make_preview,
    read_size,
)
from workers.adapter_kit.limitations import RESULT_TTL_S
from workers.adapter_kit.requirements import PILLOW
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Discovery,
    ModelNotServed,
    Requirement,
    Task,
)
from workers.backends.sdwebui.choices import PictureChoices, listed_names

JSON = dict[str, Any]

API = "/sdapi/v1"
NO_CHECKPOINTS = "The WebUI has no checkpoint. Put one into its models/Stable-diffusion folder."
SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")
RANDOM_SEEDS = 2**32
"""Random seeds are below this, as on these servers."""
MAX_SEED = 2**63 - 1
GENERATION_FIELDS = ("negative_prompt", "size", "seed", "steps", "guidance")
EDIT_FIELDS = (*GENERATION_FIELDS, "strength", "edit", "mask")
PROGRESS_INTERVAL_S = 0.5
"""How often the progress of a call is polled."""
INTERRUPT_INTERVAL_S = 0.25
"""How often a call is interrupted: the server ignores an interrupt that comes before the work begins."""
BODY_LIMIT = 256 * 1024 * 1024
OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
UNREADABLE_IMAGE = re.compile(r"invalid encoded image|invalid image url|cannot identify image", re.IGNORECASE)


class SDWebUIBackend(ImageBackend):
    """Serve the checkpoints of one WebUI. See the module's docstring."""

    name = "sdwebui"
    option_names = frozenset({"steps", "size", KEEP_METADATA})

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        self._defaults = _defaults(config.options)
        self._client = HttpClient(config.url, headers=authorization_header(config.api_key))
        self._descriptors = DescriptorCache()
        self._titles: dict[str, str] | None = None
        """The checkpoint's title of each model; None before the first `discover`."""
        self._choices = PictureChoices()
        self._loaded = ""
        self._no_progress_until = 0.0
        self._current = ""
        """The task that the server ran at the last poll."""
        self._call_lock = asyncio.Lock()

    async def close(self) -> None:
        await self._client.close()

    def requirements(self) -> tuple[Requirement, ...]:
        """Return Pillow, for the sizes and masks of edits."""
        return (PILLOW,)

    async def discover(self) -> Discovery:
        """Return every checkpoint, or those of `config.models`. Raises BackendError when there is none to serve."""
        listed = await self._get("/sd-models")
        if not isinstance(listed, list):
            raise BackendError(
                "the backend's answer to /sdapi/v1/sd-models is not a list of models; check the worker's URL"
            )
        titles = {str(model.get("model_name") or model["title"]): str(model["title"]) for model in listed}
        problems = self.missing_models("the backend", titles)
        served = {name: titles[name] for name in self.config.models or titles if name in titles}
        if not served:
            raise BackendError(problems[0] if problems else NO_CHECKPOINTS)
        self._loaded = await self._loaded_title()
        self._choices = PictureChoices(
            *[await self._list_names(path) for path in ("/samplers", "/schedulers", "/loras")]
        )
        self._titles = served
        return image_discovery({name: self._is_loaded(title) for name, title in served.items()}, problems)

    def describe(self, _offer: ModelOffer) -> ModelDescriptor:
        """Return what every checkpoint can be told."""
        return self._descriptors.get("", self._choices, self._describe)

    def _describe(self) -> dict[str, EndpointDescriptor]:
        defaults = self._defaults
        size = f"{defaults['width']}x{defaults['height']}" if "width" in defaults else "512x512"
        options = PictureOptions(
            fields=frozenset((*GENERATION_FIELDS, "strength")),
            defaults={"size": size, "steps": defaults.get("steps")},
            max_seed=MAX_SEED - 1,
            extra=self._choices.parameters(),
        )
        return {"/v1/images/generations": images.generations(options), "/v1/images/edits": images.edits(options)}

    async def health(self) -> None:
        """Poll `/sdapi/v1/sd-models`, which all of these servers have."""
        try:
            await self._get("/sd-models")
        except BackendError as error:
            raise BackendUnavailable(str(error)) from error

    async def start_request(self, task: Task) -> tuple[ImageRequest, AsyncGenerator[Progress | GeneratedImage]]:
        """Check a task, and return it with its images as they are made. Raises BackendRefused, ModelNotServed."""
        if self._titles is None:
            await self.discover()
        title = (self._titles or {}).get(task.model)
        if title is None:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        request = ImageRequest.from_task(task)
        request.require_supported(*(EDIT_FIELDS if request.edit else GENERATION_FIELDS), *self._choices.fields)
        if request.seed is not None and request.seed + request.n > MAX_SEED:
            raise BackendRefused(f"The seed is too large. Send seed + n of at most {MAX_SEED}.", param="seed")
        chosen = self._choices.request_fields(request.extra, request.prompt)
        return request, self._generate(task, request, title, chosen)

    async def _generate(
        self, task: Task, request: ImageRequest, title: str, chosen: JSON
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        body = chosen | await self._request_body(request, title)
        path = "/img2img" if request.edit else "/txt2img"
        first = random.randrange(RANDOM_SEEDS) if request.seed is None else request.seed
        if self._call_lock.locked():
            yield Progress(phase="queued")
        for number in range(request.n):
            call = {"seed": first + number, "force_task_id": f"task({task.job}-{number})"}
            async with self._call_lock, aclosing(self._generate_one(path, body | call, request, number)) as items:
                async for item in items:
                    yield item

    async def _request_body(self, request: ImageRequest, title: str) -> JSON:
        """Return the fields that all calls of a request have in common."""
        body: JSON = {
            **self._defaults,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps or self._defaults.get("steps"),
            "cfg_scale": request.guidance,
            "batch_size": 1,
            "override_settings": {"sd_model_checkpoint": title},
            "override_settings_restore_afterwards": False,  # otherwise each request would load two models
        }
        if request.width is not None:
            body |= {"width": request.width, "height": request.height}
        if request.edit:
            body |= await _edit_fields(request)
        return {name: value for name, value in body.items() if value is not None}

    async def _generate_one(
        self, path: str, body: JSON, request: ImageRequest, number: int
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        """Yield the progress of one call, and its image. Closing the generator interrupts the server."""
        call = asyncio.ensure_future(self._post(path, body))
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=PROGRESS_INTERVAL_S)
                if not call.done():
                    async for item in self._report_progress(body, request, number):
                        yield item
            result = call.result()
        finally:
            await self._interrupt(call, body["force_task_id"])
        self._loaded = body["override_settings"]["sd_model_checkpoint"]
        yield _image_from_response(result, body["seed"], number)

    async def _report_progress(
        self, body: JSON, request: ImageRequest, number: int
    ) -> AsyncIterator[Progress | GeneratedImage]:
        """Yield the progress of a call, and a preview. A call that waits for another one, or for its model, reports that."""
        answer = await self._poll_progress()
        state = answer.get("state") or {}
        current = answer.get("current_task")
        self._current = str(current or "")
        if current and current != body["force_task_id"]:
            yield Progress(phase="queued")
            return
        step, steps = int(state.get("sampling_step") or 0), int(state.get("sampling_steps") or 0)
        title = body["override_settings"]["sd_model_checkpoint"]
        if (
            not step or not steps or state.get("job_count") == 0
        ):  # without a job, the steps are those of the previous call
            yield Progress(phase="load" if self._is_loaded(title) is False else "run")
            return
        self._loaded = title
        fraction = min(1.0, (number + float(answer.get("progress") or 0)) / request.n)
        preview = _decode_image(answer.get("current_image"))
        small = await make_preview(preview, detect_content_type(preview) or "image/png") if preview else None
        yield Progress(fraction=fraction, step=step, steps=steps, preview=small)
        if preview:
            yield GeneratedImage(preview, final=False, index=number)

    async def _poll_progress(self) -> JSON:
        """Return the server's progress; {} where the server has no such route."""
        if monotonic() < self._no_progress_until:
            return {}
        try:
            answer = await self._get("/progress")
        except BackendRefused:  # stable-diffusion.cpp does not have the route
            self._no_progress_until = monotonic() + RESULT_TTL_S
            return {}
        except BackendError:  # the call itself fails with the reason
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _interrupt(self, call: asyncio.Future[JSON], task_id: str) -> None:
        """Interrupt a call, and return when it has ended. Calls of other clients are not interrupted.

        A call that ran at the last poll is interrupted without another poll, which may take seconds.
        """
        status = 0
        while not call.done() and status != 404:
            with suppress(BackendError):
                known, self._current = self._current == task_id, ""
                if known or (await self._poll_progress()).get("current_task") in (None, task_id):
                    status, _ = await self._exchange("POST", f"{API}/interrupt", b"{}")
            await asyncio.wait({call}, timeout=INTERRUPT_INTERVAL_S)
        await asyncio.wait({call})  # stable-diffusion.cpp cannot be interrupted
        if not call.cancelled():
            call.exception()  # retrieved, so that asyncio does not log it

    async def _list_names(self, path: str) -> tuple[str, ...]:
        """Return the names of a list; none where the server does not have it."""
        try:
            return listed_names(await self._get(path))
        except BackendRefused:
            return ()

    async def _loaded_title(self) -> str:
        try:
            options = await self._get("/options")
        except BackendRefused:
            return ""
        return str(options.get("sd_model_checkpoint") or "") if isinstance(options, dict) else ""

    def _is_loaded(self, title: str) -> bool | None:
        """Return whether the server holds a checkpoint in memory; None where it does not report it. Titles may lack their hash."""
        return self._loaded in (title, title.partition(" [")[0]) if self._loaded else None

    # HTTP

    async def _get(self, path: str) -> Any:
        try:
            status, body = await self._exchange("GET", API + path)
        except BackendError as error:
            raise (BackendUnavailable(str(error)) if error.transient else error) from error
        if status == 404:
            raise BackendRefused(
                f"The backend has no {API}{path}: start stable-diffusion-webui or Forge with --api, or correct the worker's --url."
            )
        if status != 200:
            raise error_from_response(status, {}, body)
        return _parse_json(body)

    async def _post(self, path: str, body: JSON) -> JSON:
        data = orjson.dumps(body)
        # A body that is streamed is never sent a second time, when an idle connection proves to be closed.
        response = await self._client.request("POST", API + path, pieces=_stream_once(data), length=len(data))
        status, answer = response.status, await _read_and_close(response)
        if status != 200:
            raise _error_from_response(status, response.headers, answer)
        value = _parse_json(answer)
        if not isinstance(value, dict):
            raise BackendError("the backend's answer is not a JSON object")
        return value

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        response = await self._client.request(method, path, body)
        return response.status, await _read_and_close(response)


def _defaults(options: dict[str, str]) -> JSON:
    defaults: JSON = {}
    if "steps" in options:
        defaults["steps"] = int(options["steps"])
    if "size" in options:
        match = SIZE.fullmatch(options["size"])
        if match is None:
            raise ValueError("the option size must look like 1024x1024")
        defaults |= {"width": int(match[1]), "height": int(match[2])}
    return defaults


async def _edit_fields(request: ImageRequest) -> JSON:
    """Return the fields of an edit. The image's own size is the default: these servers would take 512x512."""
    if not request.images:
        raise BackendRefused("The file 'image' is missing. An edit needs it.", param="image")
    image = await request.images[0].read()
    size = await read_size(image)
    if size is None:
        raise BackendRefused("The file 'image' cannot be read as an image.", param="image")
    width, height = (
        (request.width, request.height) if request.width else (_round_to_eight(size[0]), _round_to_eight(size[1]))
    )
    body: JSON = {
        "init_images": [base64.b64encode(image).decode()],
        "width": width,
        "height": height,
        "denoising_strength": request.strength,
    }
    if request.mask is not None:
        mask = await make_edit_mask(await request.mask.read())
        # 1: the masked area begins as the original image.
        body |= {"mask": base64.b64encode(mask).decode(), "inpainting_fill": 1, "inpainting_mask_invert": 0}
        body["denoising_strength"] = 1.0 if request.strength is None else request.strength
    return body


def _round_to_eight(side: int) -> int:
    return max(8, side // 8 * 8)


def _image_from_response(result: JSON, seed: int, number: int) -> GeneratedImage:
    """Return the first image that is not a grid; extensions append others."""
    images = result.get("images")
    info = result.get("info")
    with suppress(orjson.JSONDecodeError):
        info = orjson.loads(info) if isinstance(info, str) else info
    info = info if isinstance(info, dict) else {}
    first = info.get("index_of_first_image")
    at = first if isinstance(first, int) else 0
    data = _decode_image(images[at]) if isinstance(images, list) and len(images) > at else b""
    if not data:
        raise BackendError("the backend answered without an image")
    seeds = info.get("all_seeds")
    made_with = seeds[0] if isinstance(seeds, list) and seeds and isinstance(seeds[0], int) else seed
    return GeneratedImage(data, seed=made_with, index=number)


def _decode_image(text: Any) -> bytes:
    if not isinstance(text, str):
        return b""
    try:
        return base64.b64decode(text.rpartition(",")[2])  # some servers send a data URL
    except ValueError as error:
        raise BackendError("the backend's image is not base64") from error


async def _stream_once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read_and_close(response: BackendResponse) -> bytes:
    try:
        return await response.read_all(BODY_LIMIT)
    finally:
        response.close()


def _parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError("the backend's answer is not JSON") from error


def _error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """Return the error of a response: FastAPI's `detail`, or `{"error": class, "detail", "errors": text}` with status 500."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    value = value if isinstance(value, dict) else {}
    detail = value.get("detail")
    kind = str(value.get("error") or "")
    text = next((str(answer) for answer in (detail, value.get("errors"), value.get("message"), kind) if answer), "")
    if OUT_OF_MEMORY.search(f"{kind} {text}"):
        return BackendError("the backend ran out of memory", code="backend_out_of_memory", transient=True)
    if UNREADABLE_IMAGE.search(text):
        return BackendRefused(f"the backend cannot read the image: {text}", param="image")
    if status == 500:
        return BackendError(
            f"the backend failed: {kind}: {text}" if kind and kind != text else f"the backend failed: {text}"
        )
    if status == 404 and text and text != "Not Found":
        return BackendRefused(text)
    return error_from_response(status, headers, body)
