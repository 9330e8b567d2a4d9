"""ComfyUI: an operator's own workflows as models.

Options: `workflows=DIR` (each `NAME.json` in it is a model called NAME) or `workflow=FILE`; `workflows.py` describes how the slots of a workflow
are named. `keep_metadata=true` leaves in images what ComfyUI writes into them: the whole workflow. Without either option, each checkpoint of ComfyUI is
a model with a plain workflow. A workflow that this ComfyUI cannot run, because it lacks a node class or a model file, is not served but reported.

ComfyUI runs one prompt at a time and queues the others. Events on its websocket are only hints; its queue and history decide. A field of the
request for which a workflow has no slot is refused.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from schemas.descriptors import ModelDescriptor
from schemas.frames import Progress
from schemas.presence import ModelOffer
from workers.adapter_kit.descriptors import DescriptorCache
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
from workers.backends.comfyui.descriptors import describe_checkpoint, describe_workflow
from workers.backends.comfyui.node_checks import lists_files, node_classes, workflow_problem
from workers.backends.comfyui.prompt_builder import (
    PromptPlan,
    check_request,
    checkpoint_workflow,
    plan_prompts,
    request_field,
)
from workers.backends.comfyui.workflows import Workflow, WorkflowFiles, sampler_nodes

JSON = dict[str, Any]

OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
UNREADABLE_IMAGE = re.compile(r"UnidentifiedImageError|cannot identify image", re.IGNORECASE)
LOADERS = frozenset({"LoadImage", "LoadImageMask"})
"""Classes of nodes that can load a temporary upload."""
MAX_CLASS_REQUESTS = 4
"""Requests about node classes at a time."""
SUFFIXES = {"image/jpeg": ".jpg", "image/webp": ".webp"}


class ComfyUIBackend(ImageBackend):
    """Serve the workflows of one ComfyUI. See the module's docstring."""

    name = "comfyui"
    option_names = frozenset({"workflow", "workflows", KEEP_METADATA})

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL, an option or a workflow is invalid."""
        super().__init__(config)
        self._files = WorkflowFiles(config.options.get("workflows", ""), config.options.get("workflow", ""))
        self._workflows: dict[str, Workflow] = {}
        """The workflows that ComfyUI can run."""
        self._unusable: dict[str, str] = {}
        """Why ComfyUI cannot run each of the other workflows."""
        self._classes: dict[str, JSON | None] = {}
        """ComfyUI's node classes, None for one that it lacks. Cleared when it does not answer: it may restart with others."""
        self._server = ComfyUIClient(config.url, config.api_key)
        self._descriptors = DescriptorCache()
        self._cleanups: set[asyncio.Task[None]] = set()
        """Tasks that stop prompts in ComfyUI."""
        self._served: frozenset[str] | None = None

    async def close(self) -> None:
        for task in list(self._cleanups):
            task.cancel()
        await asyncio.gather(*self._cleanups, return_exceptions=True)
        await self._server.close()

    def requirements(self) -> tuple[Requirement, ...]:
        """Return Pillow, and aiohttp for ComfyUI's websocket."""
        return (Library("aiohttp", "aiohttp", "ComfyUI's websocket", "images"), PILLOW)

    async def discover(self) -> Discovery:
        """Return the workflows that ComfyUI can run, or its checkpoints where the operator names no workflow; all, or those of `config.models`.

        Raises BackendError when none of them can be served.
        """
        await self.health()
        if not self._classes:
            await self._server.learn_version()
        names, problems = await self._usable_workflows() if self._files else (await self._checkpoints(), [])
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

    async def _usable_workflows(self) -> tuple[tuple[str, ...], list[str]]:
        """Return the workflows that ComfyUI can run, and the problems of the others."""
        self._files.refresh()
        workflows = self._files.workflows
        problems = list(self._files.problems)
        classes = await self._poll_classes(workflows.values())
        found = {name: workflow_problem(workflow, classes) for name, workflow in workflows.items()}
        self._unusable = {name: problem for name, problem in found.items() if problem is not None}
        self._workflows = {name: workflows[name] for name, problem in found.items() if problem is None}
        wanted = self.config.models or tuple(workflows)
        problems += [problem for name, problem in self._unusable.items() if name in wanted]
        return tuple(self._workflows), problems

    async def _poll_classes(self, workflows: Iterable[Workflow]) -> dict[str, JSON | None]:
        """Return the node classes of the workflows. Classes that were missing, and those that list model files, are requested again."""
        wanted = sorted({kind for workflow in workflows for kind in node_classes(workflow)})
        stale = [kind for kind in wanted if not (info := self._classes.get(kind)) or lists_files(info)]
        limit = asyncio.Semaphore(MAX_CLASS_REQUESTS)

        async def ask(kind: str) -> None:
            async with limit:
                self._classes.pop(kind, None)
                with suppress(NodeClassUnavailable):
                    self._classes[kind] = await self._server.node_class(kind)

        for outcome in await asyncio.gather(*map(ask, stale), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return self._classes

    async def _checkpoints(self) -> tuple[str, ...]:
        return tuple(str(name) for name in await self._server.get("/models/checkpoints"))

    def describe(self, offer: ModelOffer) -> ModelDescriptor:
        """Return the slots of a workflow, or what a checkpoint can be told."""
        workflow = self._workflows.get(offer.name)
        if workflow is None:
            return self._descriptors.get(offer.name, None, lambda: describe_checkpoint(offer.name))
        classes = {kind: self._classes.get(kind) for kind in node_classes(workflow)}
        return self._descriptors.get(offer.name, (workflow, classes), lambda: describe_workflow(workflow, classes))

    async def health(self) -> None:
        """Poll `/prompt`, which reports the length of the queue."""
        try:
            await self._server.get("/prompt")
        except BackendError as error:
            self._classes = {}
            raise BackendUnavailable(str(error)) from error

    async def start_request(self, task: Task) -> tuple[ImageRequest, AsyncGenerator[Progress | GeneratedImage]]:
        """Check a task, and return it with its images as they are made. Raises BackendRefused, BackendUnavailable, ModelNotServed."""
        if self._served is None:
            await self.discover()
        if task.model not in (self._served or ()):
            if task.model in self._files.workflows:
                raise BackendUnavailable(self._unusable.get(task.model, f"The workflow {task.model!r} is not served."))
            raise ModelNotServed(f"ComfyUI has no workflow or checkpoint called {task.model!r}", param="model")
        request = ImageRequest.from_task(task)
        workflow = self._workflows.get(task.model) or checkpoint_workflow(task.model, request)
        check_request(workflow, request)
        return request, self._generate(task, request, workflow)

    async def _generate(
        self, task: Task, request: ImageRequest, workflow: Workflow
    ) -> AsyncGenerator[Progress | GeneratedImage]:
        files = await self._upload_files(task, request, workflow)
        made = 0
        async with self._server.open_listener() as listener:
            runs = plan_prompts(workflow, request, files, random.getrandbits(32))
            for number, plan in enumerate(runs):
                progress = _RunProgress(workflow, number, len(runs), request.partial_images > 0)
                async with aclosing(self._run(plan, listener, progress)) as items:
                    async for item in items:
                        if isinstance(item, GeneratedImage | Progress):
                            yield item
                        else:
                            saved = _saved_images(workflow, item)[: request.n - made]
                            for at, file in enumerate(saved):
                                seed = plan.seed if at == 0 else None  # a batch has one seed, which is its first's
                                yield GeneratedImage(await self._server.view(file), seed=seed, index=made + at)
                            made += len(saved)
                if made >= request.n:
                    return

    async def _upload_files(self, task: Task, request: ImageRequest, workflow: Workflow) -> dict[str, str]:
        """Upload the request's files, and return their names in ComfyUI by slot."""
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
        self, plan: PromptPlan, listener: ComfyUIListener, progress: _RunProgress
    ) -> AsyncGenerator[Progress | GeneratedImage | JSON]:
        """Run one graph: yield its progress, and its history entry last. Closing the generator stops it."""
        prompt_id = await self._submit(plan, listener.client_id, progress)
        over = False
        try:
            while (status := await self._server.prompt_status(prompt_id)).state in (
                PromptState.QUEUED,
                PromptState.RUNNING,
            ):
                yield progress.update_from_status(status)
                while (event := await listener.next()) is not None and not progress.ends(event, prompt_id):
                    if event.kind == "status" and status.state is PromptState.QUEUED:
                        break  # the queue has moved
                    for item in await progress.update_from_event(event, prompt_id):
                        yield item
            over = True
        finally:
            if not over:
                await self._finish_cleanup(self._server.stop(prompt_id, running=progress.running))
        if status.state is PromptState.UNKNOWN:
            raise BackendError(
                "ComfyUI no longer knows the prompt: somebody deleted it from the queue, or ComfyUI restarted.",
                transient=True,
            )
        _check_status(status.entry)
        yield status.entry

    async def _submit(self, plan: PromptPlan, client_id: str, progress: _RunProgress) -> str:
        """Queue a graph, and return its prompt id. A cancelled submission is taken out of the queue."""
        submission = asyncio.ensure_future(self._server.submit(plan.graph, client_id, previews=progress.previews))
        try:
            return await asyncio.shield(submission)
        except asyncio.CancelledError:
            await self._finish_cleanup(self._withdraw(submission))
            raise
        except InvalidGraph as error:
            raise _request_error(error, progress.workflow) from error

    async def _withdraw(self, submission: asyncio.Future[str]) -> None:
        """Take a prompt out of the queue, once ComfyUI has answered with its id."""
        with suppress(BackendError):
            await self._server.stop(await submission, running=False)

    async def _finish_cleanup(self, cleanup: Coroutine[Any, Any, None]) -> None:
        """Await a cleanup, which goes on when this is cancelled."""
        task = asyncio.create_task(cleanup)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
        await asyncio.shield(task)


class _RunProgress:
    """The progress of one run, from ComfyUI's queue and events."""

    def __init__(self, workflow: Workflow, number: int, runs: int, previews: bool) -> None:
        self.workflow = workflow
        self.previews = previews
        self._number, self._runs = number, runs
        self._samplers = sampler_nodes(workflow.graph)
        self._sampled: set[str] = set()
        self._last = Progress(fraction=number / runs if number else None)
        self.running = False
        """Whether ComfyUI runs the prompt, as far as is known."""

    def update_from_status(self, status: PromptStatus) -> Progress:
        """Return the progress that the prompt's place in the queue shows."""
        self.running = status.state is PromptState.RUNNING
        if status.state is PromptState.QUEUED:
            return Progress(phase="queued", message=f"{status.before} before it in ComfyUI")
        return self._last

    def ends(self, event: ComfyUIEvent, prompt_id: str) -> bool:
        """Return whether an event ends the prompt."""
        own = event.data.get("prompt_id") == prompt_id
        over = own and event.ends(prompt_id)
        self.running = not over if own else self.running
        return over

    async def update_from_event(self, event: ComfyUIEvent, prompt_id: str) -> list[Progress | GeneratedImage]:
        """Return the progress and preview of an event; nothing for an event of another prompt, or without news."""
        if event.kind == "preview":
            return await self._preview(event.image)
        if event.data.get("prompt_id") != prompt_id:
            return []
        before = self._last
        if event.kind == "executing":
            self._start_node(str(event.data.get("node")))
        elif event.kind == "progress":
            self._update_step(str(event.data.get("node")), event.data)
        elif event.kind == "progress_state":
            for node, state in (event.data.get("nodes") or {}).items():
                if state.get("state") == "running" and state.get("max", 0) > 1:
                    self._update_step(str(node), state)
        return [] if self._last == before else [self._last]

    def _start_node(self, node: str) -> None:
        kind = str(self.workflow.graph.get(node, {}).get("class_type", ""))
        phase = "load" if "Loader" in kind else "run"
        self._last = Progress(phase=phase, fraction=self._last.fraction, message=kind or None)

    def _update_step(self, node: str, state: Mapping[str, Any]) -> None:
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
        progress = self._last.model_copy(update={"preview": await make_preview(picture, kind)})
        return [progress, GeneratedImage(picture, kind, final=False, index=self._number)]


def _nothing_to_serve(files: WorkflowFiles) -> str:
    if files:
        return "There is no workflow (NAME.json) left to serve; put one into the folder of the option workflows."
    return (
        "ComfyUI has no checkpoint, and the worker no workflow. Put a checkpoint into ComfyUI's models/checkpoints, or start the "
        "worker with --option workflows=DIR."
    )


def _saved_images(workflow: Workflow, entry: JSON) -> list[JSON]:
    """Return the images of the output node, or of the one node that saved any; of several nodes, those with images that are not temporary."""
    outputs = {node: entry["outputs"].get(node) or {} for node in workflow.graph if node in entry.get("outputs", {})}
    chosen = {target.node for target in workflow.slots.get("output", ())}
    found = {
        node: [file for file in output.get("images") or () if isinstance(file, dict) and file.get("filename")]
        for node, output in outputs.items()
        if not chosen or node in chosen
    }
    outputs = {node: [file for file in files if file.get("type") == "output"] for node, files in found.items()}
    nodes = {node: files for node, files in (outputs if any(outputs.values()) else found).items() if files}
    if not nodes:
        raise BackendError("the workflow ended without an image; it needs a node that saves one, such as SaveImage")
    if len(nodes) > 1 and not chosen:
        names = ", ".join(nodes)
        raise BackendError(
            f"the workflow saves images in the nodes {names}; give the node with the result the title nexus:output"
        )
    return [file for files in nodes.values() for file in files]


def _check_status(entry: JSON) -> None:
    """Raise BackendError when the run failed. Older servers report no status."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return
    messages: dict[str, JSON] = dict(status.get("messages") or ())
    if "execution_error" not in messages:
        raise BackendError("The prompt was interrupted in ComfyUI.")
    error = messages["execution_error"]
    text = str(error.get("exception_message", "")).strip()
    what = f"{error.get('exception_type', '')} {text}"
    if UNREADABLE_IMAGE.search(what):
        raise BackendRefused(f"ComfyUI cannot read the image: {text}", param="image")
    where = f"{error.get('node_type', 'a node')} (node {error.get('node_id', '?')})"
    if OUT_OF_MEMORY.search(what):
        raise BackendError(f"ComfyUI ran out of memory in {where}", code="backend_out_of_memory", transient=True)
    raise BackendError(f"ComfyUI failed in {where}: {text or error.get('exception_type')}")


def _request_error(error: InvalidGraph, workflow: Workflow) -> BackendError:
    """Return the error of the request's field that ComfyUI refused, or of a missing checkpoint; else the error itself."""
    for node, kind, name, text in error.faults:
        param = request_field(workflow, node, name)
        if param is not None:
            return BackendRefused(f"{param}: {text}", param=param)
        if name == "ckpt_name" and kind == "CheckpointLoaderSimple":
            return ModelNotServed(f"ComfyUI lacks the checkpoint: {text}", param="model")
    return error
