"""ComfyUI: an operator's own workflows as models.

Options: `workflows=DIR` (each `NAME.json` in it is a model called NAME) or `workflow=FILE`; how their slots are named says
`comfyui_workflows`. `keep_metadata=true` leaves in pictures what ComfyUI writes into them: the whole workflow. Without a workflow, each checkpoint that ComfyUI has is a model with a plain workflow of our own. A workflow that
this ComfyUI cannot run, for want of a node or of a model's file, is not served but reported: `comfyui_checks`.

ComfyUI works on one prompt at a time and queues the others; what it says over its websocket is only news, its queue and history
decide. A field of the request for which a workflow has no slot is refused.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from schemas.frames import Progress
from workers.adapter_kit.images.backend import ImageBackend, image_discovery
from workers.adapter_kit.images.responses import (
    KEEP_METADATA,
    GeneratedImage,
    ImageRequest,
    make_preview,
)
from workers.adapter_kit.multipart import FilePart
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
from workers.backends.comfyui.client import (
    ComfyUIClient,
    ComfyUIEvent,
    ComfyUIListener,
    InvalidGraph,
    NodeClassUnavailable,
    PromptState,
    PromptStatus,
)
from workers.backends.comfyui.node_checks import classes_of, lists_files, problem_of
from workers.backends.comfyui.prompt_builder import PromptPlan, check, checkpoint_workflow, field_of, plans
from workers.backends.comfyui.workflows import Workflow, WorkflowFiles, sampler_nodes

JSON = dict[str, Any]

OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
NO_PICTURE = re.compile(r"UnidentifiedImageError|cannot identify image", re.IGNORECASE)
LOADERS = frozenset({"LoadImage", "LoadImageMask"})
"""Nodes that can load what was uploaded as temporary."""
MAX_ASKED = 4
"""Questions about node classes at a time."""
SUFFIXES = {"image/jpeg": ".jpg", "image/webp": ".webp"}


class ComfyUIBackend(ImageBackend):
    """See the module's docstring."""

    name = "comfyui"
    option_names = frozenset({"workflow", "workflows", KEEP_METADATA})

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError when the URL, an option or a workflow makes no sense."""
        super().__init__(config)
        self._files = WorkflowFiles(config.options.get("workflows", ""), config.options.get("workflow", ""))
        self._workflows: dict[str, Workflow] = {}
        """Those that are served."""
        self._lacking: dict[str, str] = {}
        """What ComfyUI lacks for each of the others."""
        self._classes: dict[str, JSON | None] = {}
        """What ComfyUI said of node classes; forgotten when it does not answer, since it may come back with others."""
        self._server = ComfyUIClient(config.url, config.api_key)
        self._endings: set[asyncio.Task[None]] = set()
        """What is being stopped in ComfyUI."""
        self._served: frozenset[str] | None = None

    async def close(self) -> None:
        for task in list(self._endings):
            task.cancel()
        await asyncio.gather(*self._endings, return_exceptions=True)
        await self._server.close()

    def requirements(self) -> tuple[Requirement, ...]:
        """Pillow, and aiohttp for ComfyUI's websocket."""
        return (Library("aiohttp", "aiohttp", "ComfyUI's websocket", "images"), PILLOW)

    async def discover(self) -> Discovery:
        """The workflows that ComfyUI can run, or without any the checkpoints; all, or those of `config.models`.

        Raises BackendError when nothing of it can be served.
        """
        await self.health()
        if not self._classes:
            await self._server.learn_version()
        names, problems = await self._usable() if self._files else (await self._checkpoints(), [])
        served = tuple(name for name in self.config.models or names if name in names)
        known = {*names, *self._files.workflows}
        kind = "workflow" if self._files else "checkpoint"
        problems += [
            f"There is no {name}; the {kind}s are {', '.join(sorted(known)) or 'none'}."
            for name in self.config.models
            if name not in known
        ]
        if not served:
            raise BackendError(" ".join(problems) or _nothing_to_serve(self._files))
        self._served = frozenset(served)
        return image_discovery(dict.fromkeys(served), problems)

    async def _usable(self) -> tuple[tuple[str, ...], list[str]]:
        """The workflows that can run, and what keeps the others from it."""
        self._files.refresh()
        workflows = self._files.workflows
        problems = list(self._files.problems)
        classes = await self._known_classes(workflows.values())
        found = {name: problem_of(workflow, classes) for name, workflow in workflows.items()}
        self._lacking = {name: problem for name, problem in found.items() if problem is not None}
        self._workflows = {name: workflows[name] for name, problem in found.items() if problem is None}
        wanted = self.config.models or tuple(workflows)
        problems += [problem for name, problem in self._lacking.items() if name in wanted]
        return tuple(self._workflows), problems

    async def _known_classes(self, workflows: Iterable[Workflow]) -> dict[str, JSON | None]:
        """What ComfyUI says of the workflows' classes; asked again of those that it lacked, or that list files."""
        wanted = sorted({kind for workflow in workflows for kind in classes_of(workflow)})
        stale = [kind for kind in wanted if not (info := self._classes.get(kind)) or lists_files(info)]
        turn = asyncio.Semaphore(MAX_ASKED)

        async def ask(kind: str) -> None:
            async with turn:
                self._classes.pop(kind, None)
                with suppress(NodeClassUnavailable):
                    self._classes[kind] = await self._server.node_class(kind)

        for outcome in await asyncio.gather(*map(ask, stale), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return self._classes

    async def _checkpoints(self) -> tuple[str, ...]:
        return tuple(str(name) for name in await self._server.ask("/models/checkpoints"))

    async def health(self) -> None:
        """`GET /prompt`, which says how long the queue is."""
        try:
            await self._server.ask("/prompt")
        except BackendError as error:
            self._classes = {}
            raise BackendUnavailable(str(error)) from error

    async def start_request(self, task: Task) -> tuple[ImageRequest, AsyncGenerator[Progress | GeneratedImage]]:
        """Check a task, and return it with its images as they are made. Raises BackendRefused, BackendUnavailable, ModelNotServed."""
        if self._served is None:
            await self.discover()
        if task.model not in (self._served or ()):
            if task.model in self._files.workflows:
                raise BackendUnavailable(self._lacking.get(task.model, f"The workflow {task.model!r} is not served."))
            raise ModelNotServed(f"there is no workflow or checkpoint called {task.model!r}", param="model")
        request = ImageRequest.from_task(task)
        workflow = self._workflows.get(task.model) or checkpoint_workflow(task.model, request)
        check(workflow, request)
        return request, self._pictures(task, request, workflow)

    async def _pictures(
        self, task: Task, request: ImageRequest, workflow: Workflow
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        files = await self._uploaded(task, request, workflow)
        made = 0
        async with self._server.listening() as listener:
            runs = plans(workflow, request, files, random.getrandbits(32))
            for number, plan in enumerate(runs):
                news = _RunProgress(workflow, number, len(runs), request.partial_images > 0)
                async with aclosing(self._run(plan, listener, news)) as items:
                    async for item in items:
                        if isinstance(item, GeneratedImage | Progress):
                            yield item
                        else:
                            saved = _saved(workflow, item)[: request.n - made]
                            for at, file in enumerate(saved):
                                seed = plan.seed if at == 0 else None  # a batch has one seed, which is its first's
                                yield GeneratedImage(await self._server.view(file), seed=seed, index=made + at)
                            made += len(saved)
                if made >= request.n:
                    return

    async def _uploaded(self, task: Task, request: ImageRequest, workflow: Workflow) -> dict[str, str]:
        """The request's files, and the names under which ComfyUI knows them."""
        files: dict[str, UploadedFile | None] = {
            "image": request.images[0] if request.images else None,
            "mask": request.mask,
        }
        names: dict[str, str] = {}
        for slot, file in files.items():
            targets = workflow.slots.get(slot, ())
            if file is None or not targets:
                continue
            temporary = all(workflow.graph[target.node]["class_type"] in LOADERS for target in targets)
            name = f"{task.job}-{slot}{SUFFIXES.get(file.content_type, '.png')}"
            part = FilePart("image", name, file.content_type, file.size, file.pieces)
            names[slot] = await self._server.upload(part, temporary=temporary)
        return names

    async def _run(
        self, plan: PromptPlan, listener: ComfyUIListener, news: _RunProgress
    ) -> AsyncGenerator[Progress | GeneratedImage | JSON]:
        """Run a graph: how far it is, and in the end what its history says. Closed before that, it is stopped."""
        prompt_id = await self._submitted(plan, listener.client_id, news)
        over = False
        try:
            while (look := await self._server.look(prompt_id)).where in (PromptState.QUEUED, PromptState.RUNNING):
                yield news.seen(look)
                while (event := await listener.next()) is not None and not news.ends(event, prompt_id):
                    if event.kind == "status" and look.where is PromptState.QUEUED:
                        break  # the queue has moved
                    for item in await news.heard(event, prompt_id):
                        yield item
            over = True
        finally:
            if not over:
                await self._end(self._server.stop(prompt_id, running=news.running))
        if look.where is PromptState.GONE:
            raise BackendError("ComfyUI forgot the work: it was taken from its queue, or restarted", transient=True)
        _check_status(look.entry)
        yield look.entry

    async def _submitted(self, plan: PromptPlan, client_id: str, news: _RunProgress) -> str:
        """Queue it. A caller who leaves meanwhile leaves nothing in the queue."""
        submission = asyncio.ensure_future(self._server.submit(plan.graph, client_id, previews=news.previews))
        try:
            return await asyncio.shield(submission)
        except asyncio.CancelledError:
            await self._end(self._withdraw(submission))
            raise
        except InvalidGraph as error:
            raise _about_the_request(error, news.workflow) from error

    async def _withdraw(self, submission: asyncio.Future[str]) -> None:
        """Take back what is being queued: its id is known once ComfyUI has checked it."""
        with suppress(BackendError):
            await self._server.stop(await submission, running=False)

    async def _end(self, ending: Coroutine[Any, Any, None]) -> None:
        """Wait for an end. A caller who does not wait so long does not keep it from coming."""
        task = asyncio.create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        await asyncio.shield(task)


class _RunProgress:
    """How far a run is, from what ComfyUI says."""

    def __init__(self, workflow: Workflow, number: int, runs: int, previews: bool) -> None:
        self.workflow = workflow
        self.previews = previews
        self._number, self._runs = number, runs
        self._samplers = sampler_nodes(workflow.graph)
        self._sampled: set[str] = set()
        self._last = Progress(fraction=number / runs if number else None)
        self.running = False
        """ComfyUI is at it, as far as was said."""

    def seen(self, look: PromptStatus) -> Progress:
        """What the queue says."""
        self.running = look.where is PromptState.RUNNING
        if look.where is PromptState.QUEUED:
            return Progress(phase="queued", message=f"{look.before} before it in ComfyUI")
        return self._last

    def ends(self, event: ComfyUIEvent, prompt_id: str) -> bool:
        """Whether an event says that the prompt is over."""
        own = event.data.get("prompt_id") == prompt_id
        over = own and event.ends(prompt_id)
        self.running = not over if own else self.running
        return over

    async def heard(self, event: ComfyUIEvent, prompt_id: str) -> list[Progress | GeneratedImage]:
        """What an event says; nothing, where it is another prompt's or says nothing new."""
        if event.kind == "preview":
            return await self._preview(event.picture)
        if event.data.get("prompt_id") != prompt_id:
            return []
        before = self._last
        if event.kind == "executing":
            self._began(str(event.data.get("node")))
        elif event.kind == "progress":
            self._step(str(event.data.get("node")), event.data)
        elif event.kind == "progress_state":
            for node, state in (event.data.get("nodes") or {}).items():
                if state.get("state") == "running" and state.get("max", 0) > 1:
                    self._step(str(node), state)
        return [] if self._last == before else [self._last]

    def _began(self, node: str) -> None:
        kind = str(self.workflow.graph.get(node, {}).get("class_type", ""))
        phase = "load" if "Loader" in kind else "run"
        self._last = Progress(phase=phase, fraction=self._last.fraction, message=kind or None)

    def _step(self, node: str, state: Mapping[str, Any]) -> None:
        step, steps = int(state.get("value") or 0), int(state.get("max") or 0)
        if steps < 1:
            return
        fraction = self._last.fraction
        if node in self._samplers or not self._samplers:
            done = len(self._sampled - {node}) + step / steps
            self._sampled.add(node)
            fraction = min(1.0, (self._number + done / max(1, len(self._samplers))) / self._runs)
        self._last = Progress(fraction=fraction, step=step, steps=steps, message=self._last.message)

    async def _preview(self, picture: bytes) -> list[Progress | GeneratedImage]:
        kind = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
        shown = self._last.model_copy(update={"preview": await make_preview(picture, kind)})
        return [shown, GeneratedImage(picture, kind, final=False, index=self._number)]


def _nothing_to_serve(files: WorkflowFiles) -> str:
    if files:
        return "There is no workflow (NAME.json) left to serve; put one into the folder of the option workflows."
    return (
        "ComfyUI has no checkpoint, and the worker no workflow. Put a checkpoint into ComfyUI's models/checkpoints, or start the "
        "worker with --option workflows=DIR."
    )


def _saved(workflow: Workflow, entry: JSON) -> list[JSON]:
    """The pictures of the output node, or of the one node that saved any; where several did, those that are not temporary."""
    outputs = {node: entry["outputs"].get(node) or {} for node in workflow.graph if node in entry.get("outputs", {})}
    chosen = {target.node for target in workflow.slots.get("output", ())}
    found = {
        node: [file for file in output.get("images") or () if isinstance(file, dict) and file.get("filename")]
        for node, output in outputs.items()
        if not chosen or node in chosen
    }
    kept = {node: [file for file in files if file.get("type") == "output"] for node, files in found.items()}
    nodes = {node: files for node, files in (kept if any(kept.values()) else found).items() if files}
    if not nodes:
        raise BackendError("the workflow ended without a picture; it needs a node that saves one, such as SaveImage")
    if len(nodes) > 1 and not chosen:
        names = ", ".join(nodes)
        raise BackendError(f"the workflow saves pictures in the nodes {names}; title the one that counts nexus:output")
    return [file for files in nodes.values() for file in files]


def _check_status(entry: JSON) -> None:
    """Raises BackendError when the run failed. Older servers give no status."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return
    said: dict[str, JSON] = dict(status.get("messages") or ())
    if "execution_error" not in said:
        raise BackendError("somebody interrupted the work in ComfyUI")
    error = said["execution_error"]
    text = str(error.get("exception_message", "")).strip()
    what = f"{error.get('exception_type', '')} {text}"
    if NO_PICTURE.search(what):
        raise BackendRefused(f"ComfyUI cannot read the picture: {text}", param="image")
    where = f"{error.get('node_type', 'a node')} (node {error.get('node_id', '?')})"
    if OUT_OF_MEMORY.search(what):
        raise BackendError(f"ComfyUI ran out of memory in {where}", code="backend_out_of_memory", transient=True)
    raise BackendError(f"ComfyUI failed in {where}: {text or error.get('exception_type')}")


def _about_the_request(error: InvalidGraph, workflow: Workflow) -> BackendError:
    """The field that ComfyUI does not like, where it came from the request; or the checkpoint that is gone."""
    for node, kind, name, text in error.faults:
        param = field_of(workflow, node, name)
        if param is not None:
            return BackendRefused(f"{param}: {text}", param=param)
        if name == "ckpt_name" and kind == "CheckpointLoaderSimple":
            return ModelNotServed(f"ComfyUI lacks the checkpoint: {text}", param="model")
    return error
