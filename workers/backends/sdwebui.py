"""AUTOMATIC1111's API: stable-diffusion-webui (with `--api`), Forge, and stable-diffusion.cpp's server.

A checkpoint is a model. Several pictures are several calls, one after the other: that works on all these servers, each picture is
there as soon as it is made, and its seed is known. While a call runs, `progress` is asked for how far it is, where there is such a
thing; a call that is given up is interrupted, and waited for: these servers do not notice that a caller has gone.

Options: `steps` and `size`, which are taken where a caller says nothing; `keep_metadata=true` leaves in pictures what the server writes
into them. The key may be `USER:PASSWORD` (`--api-auth`).
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

from schemas.frames import Progress
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

JSON = dict[str, Any]

API = "/sdapi/v1"
NO_CHECKPOINTS = "The WebUI has no checkpoint. Put one into its models/Stable-diffusion folder."
SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")
FRESH_SEEDS = 2**32
"""As many as these servers choose from."""
MAX_SEED = 2**63 - 1
CAN = ("negative_prompt", "size", "seed", "steps", "guidance")
CAN_EDIT = (*CAN, "strength", "edit", "mask")
POLL_S = 0.5
"""Between two looks at how far a call is."""
INTERRUPT_S = 0.25
"""Between two interrupts: one that comes before the work begins is forgotten."""
BODY_LIMIT = 256 * 1024 * 1024
OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
BAD_IMAGE = re.compile(r"invalid encoded image|invalid image url|cannot identify image", re.IGNORECASE)


class SDWebUIBackend(ImageBackend):
    """See the module's docstring."""

    name = "sdwebui"
    option_names = frozenset({"steps", "size", KEEP_METADATA})

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError when the URL or an option makes no sense."""
        super().__init__(config)
        self._defaults = _defaults(config.options)
        self._client = HttpClient(config.url, headers=authorization_header(config.api_key))
        self._titles: dict[str, str] | None = None
        """What the server calls each model; None before the first `discover`."""
        self._loaded = ""
        self._no_progress_until = 0.0
        self._current = ""
        """The task that the server was at when it last said."""
        self._turn = asyncio.Lock()

    async def close(self) -> None:
        await self._client.close()

    def requirements(self) -> tuple[Requirement, ...]:
        """Pillow, for the sizes and masks of edits."""
        return (PILLOW,)

    async def discover(self) -> Discovery:
        """Every checkpoint, or those of `config.models`. Raises BackendError when there is none to serve."""
        listed = await self._ask("/sd-models")
        if not isinstance(listed, list):
            raise BackendError("this is no stable-diffusion-webui: its list of models is none")
        titles = {str(model.get("model_name") or model["title"]): str(model["title"]) for model in listed}
        problems = self.missing_models("the backend", titles)
        served = {name: titles[name] for name in self.config.models or titles if name in titles}
        if not served:
            raise BackendError(problems[0] if problems else NO_CHECKPOINTS)
        self._loaded = await self._loaded_title()
        self._titles = served
        return image_discovery({name: self._holds(title) for name, title in served.items()}, problems)

    async def health(self) -> None:
        """`GET /sdapi/v1/sd-models`, which all these servers have."""
        try:
            await self._ask("/sd-models")
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
        request.require_supported(*(CAN_EDIT if request.edit else CAN))
        if request.seed is not None and request.seed + request.n > MAX_SEED:
            raise BackendRefused(f"these servers take seeds up to {MAX_SEED}", param="seed")
        return request, self._pictures(task, request, title)

    async def _pictures(
        self, task: Task, request: ImageRequest, title: str
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        body = await self._body(request, title)
        path = "/img2img" if request.edit else "/txt2img"
        first = random.randrange(FRESH_SEEDS) if request.seed is None else request.seed
        if self._turn.locked():
            yield Progress(phase="queued")
        for number in range(request.n):
            call = {"seed": first + number, "force_task_id": f"task({task.job}-{number})"}
            async with self._turn, aclosing(self._call(path, body | call, request, number)) as items:
                async for item in items:
                    yield item

    async def _body(self, request: ImageRequest, title: str) -> JSON:
        """What all of a request's calls have in common."""
        body: JSON = {
            **self._defaults,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps or self._defaults.get("steps"),
            "cfg_scale": request.guidance,
            "batch_size": 1,
            "override_settings": {"sd_model_checkpoint": title},
            "override_settings_restore_afterwards": False,  # or each request would load two models
        }
        if request.width is not None:
            body |= {"width": request.width, "height": request.height}
        if request.edit:
            body |= await _edit(request)
        return {name: value for name, value in body.items() if value is not None}

    async def _call(
        self, path: str, body: JSON, request: ImageRequest, number: int
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        """One picture, and meanwhile how far it is. Closed before that, the server is stopped."""
        call = asyncio.ensure_future(self._post(path, body))
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=POLL_S)
                if not call.done():
                    async for item in self._news(body, request, number):
                        yield item
            result = call.result()
        finally:
            await self._stop(call, body["force_task_id"])
        self._loaded = body["override_settings"]["sd_model_checkpoint"]
        yield _picture(result, body["seed"], number)

    async def _news(self, body: JSON, request: ImageRequest, number: int) -> AsyncIterator[Progress | GeneratedImage]:
        """How far the call is. One that waits for another's, or for its model, says so."""
        said = await self._progress()
        state = said.get("state") or {}
        current = said.get("current_task")
        self._current = str(current or "")
        if current and current != body["force_task_id"]:
            yield Progress(phase="queued")
            return
        step, steps = int(state.get("sampling_step") or 0), int(state.get("sampling_steps") or 0)
        title = body["override_settings"]["sd_model_checkpoint"]
        if not step or not steps or state.get("job_count") == 0:  # without a job the steps are those of the last one
            yield Progress(phase="load" if self._holds(title) is False else "run")
            return
        self._loaded = title
        fraction = min(1.0, (number + float(said.get("progress") or 0)) / request.n)
        preview = _decoded(said.get("current_image"))
        shown = await make_preview(preview, detect_content_type(preview) or "image/png") if preview else None
        yield Progress(fraction=fraction, step=step, steps=steps, preview=shown)
        if preview:
            yield GeneratedImage(preview, final=False, index=number)

    async def _progress(self) -> JSON:
        """What the server says of its work; nothing, where it says nothing."""
        if monotonic() < self._no_progress_until:
            return {}
        try:
            said = await self._ask("/progress")
        except BackendRefused:  # stable-diffusion.cpp has none
            self._no_progress_until = monotonic() + RESULT_TTL_S
            return {}
        except BackendError:  # the call itself will tell what is wrong
            return {}
        return said if isinstance(said, dict) else {}

    async def _stop(self, call: asyncio.Future[JSON], task_id: str) -> None:
        """Interrupt a call, and return when it has ended. What another caller runs meanwhile is left alone.

        A call that the server was at a moment ago is interrupted without asking: it may take seconds to say what it is at.
        """
        status = 0
        while not call.done() and status != 404:
            with suppress(BackendError):
                known, self._current = self._current == task_id, ""
                if known or (await self._progress()).get("current_task") in (None, task_id):
                    status, _ = await self._exchange("POST", f"{API}/interrupt", b"{}")
            await asyncio.wait({call}, timeout=INTERRUPT_S)
        await asyncio.wait({call})  # stable-diffusion.cpp cannot be interrupted
        if not call.cancelled():
            call.exception()  # seen

    async def _loaded_title(self) -> str:
        try:
            options = await self._ask("/options")
        except BackendRefused:
            return ""
        return str(options.get("sd_model_checkpoint") or "") if isinstance(options, dict) else ""

    def _holds(self, title: str) -> bool | None:
        """Whether the server has a model in memory; None where it does not say. It may leave out the hash that titles end in."""
        return self._loaded in (title, title.partition(" [")[0]) if self._loaded else None

    # HTTP

    async def _ask(self, path: str) -> Any:
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
        return _loads(body)

    async def _post(self, path: str, body: JSON) -> JSON:
        data = orjson.dumps(body)
        # As a stream, which is never sent twice: on a kept connection that breaks in silence it would be.
        response = await self._client.request("POST", API + path, pieces=_pieces(data), length=len(data))
        status, answer = response.status, await _whole(response)
        if status != 200:
            raise _failure(status, response.headers, answer)
        value = _loads(answer)
        if not isinstance(value, dict):
            raise BackendError("the backend's answer holds no pictures")
        return value

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        response = await self._client.request(method, path, body)
        return response.status, await _whole(response)


def _defaults(options: dict[str, str]) -> JSON:
    defaults: JSON = {}
    if "steps" in options:
        defaults["steps"] = int(options["steps"])
    if "size" in options:
        match = SIZE.fullmatch(options["size"])
        if match is None:
            raise ValueError("the option size looks like 1024x1024")
        defaults |= {"width": int(match[1]), "height": int(match[2])}
    return defaults


async def _edit(request: ImageRequest) -> JSON:
    """A picture to begin with. Its own size counts where the caller gives none: these servers would take 512x512."""
    if not request.images:
        raise BackendRefused("an edit needs a file called image", param="image")
    image = await request.images[0].read()
    size = await read_size(image)
    if size is None:
        raise BackendRefused("image is not a picture that can be read", param="image")
    width, height = (request.width, request.height) if request.width else (_of_eight(size[0]), _of_eight(size[1]))
    body: JSON = {
        "init_images": [base64.b64encode(image).decode()],
        "width": width,
        "height": height,
        "denoising_strength": request.strength,
    }
    if request.mask is not None:
        mask = await make_edit_mask(await request.mask.read())
        # 1: what is painted over begins as what was there.
        body |= {"mask": base64.b64encode(mask).decode(), "inpainting_fill": 1, "inpainting_mask_invert": 0}
        body["denoising_strength"] = 1.0 if request.strength is None else request.strength
    return body


def _of_eight(side: int) -> int:
    return max(8, side // 8 * 8)


def _picture(result: JSON, seed: int, number: int) -> GeneratedImage:
    """The first picture that is none of a grid; extensions add others behind it."""
    images = result.get("images")
    info = result.get("info")
    with suppress(orjson.JSONDecodeError):
        info = orjson.loads(info) if isinstance(info, str) else info
    info = info if isinstance(info, dict) else {}
    first = info.get("index_of_first_image")
    at = first if isinstance(first, int) else 0
    data = _decoded(images[at]) if isinstance(images, list) and len(images) > at else b""
    if not data:
        raise BackendError("the backend ended without a picture")
    seeds = info.get("all_seeds")
    made_with = seeds[0] if isinstance(seeds, list) and seeds and isinstance(seeds[0], int) else seed
    return GeneratedImage(data, seed=made_with, index=number)


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        return b""
    try:
        return base64.b64decode(text.rpartition(",")[2])  # some put a data URL's beginning before it
    except ValueError as error:
        raise BackendError("the backend's picture is not base64") from error


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _whole(response: BackendResponse) -> bytes:
    try:
        return await response.read_all(BODY_LIMIT)
    finally:
        response.close()


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError("the backend answered something that is not JSON") from error


def _failure(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """Errors of these servers: FastAPI's `detail`, or `{"error": class, "detail", "errors": text}` with status 500."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    value = value if isinstance(value, dict) else {}
    detail = value.get("detail")
    kind = str(value.get("error") or "")
    text = next((str(said) for said in (detail, value.get("errors"), value.get("message"), kind) if said), "")
    if OUT_OF_MEMORY.search(f"{kind} {text}"):
        return BackendError("the backend ran out of memory", code="backend_out_of_memory", transient=True)
    if BAD_IMAGE.search(text):
        return BackendRefused(f"the backend cannot read the picture: {text}", param="image")
    if status == 500:
        return BackendError(
            f"the backend failed: {kind}: {text}" if kind and kind != text else f"the backend failed: {text}"
        )
    if status == 404 and text and text != "Not Found":
        return BackendRefused(text)
    return error_from_response(status, headers, body)
