"""The graphs that ComfyUI runs for a request for images: pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from workers.adapter_kit.images.responses import ImageRequest
from workers.backends.base import BackendRefused
from workers.backends.comfyui.workflows import Graph, NodeInput, Workflow

REQUEST_FIELDS = {"negative": "negative_prompt", "width": "size", "height": "size", "image": "edit"}
"""The request's fields of slots that have another name."""
IMPLICIT_SLOTS = frozenset({"prompt", "n", "output"})


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One run of a graph."""

    graph: Graph
    seed: int | None
    """The seed of its first image; None where no slot sets it."""


def check_request(workflow: Workflow, request: ImageRequest) -> None:
    """Raise BackendRefused for a field without a slot, and for a file that the workflow needs and the request lacks."""
    slots = workflow.slots
    request.require_supported(
        *dict.fromkeys(REQUEST_FIELDS.get(name, name) for name in slots if name not in IMPLICIT_SLOTS)
    )
    if "image" in slots and not request.edit:
        raise BackendRefused("This workflow edits an image. Send one to /v1/images/edits.", param="image")
    if "mask" in slots and request.mask is None:
        raise BackendRefused("This workflow needs a mask. Send the file 'mask'.", param="mask")
    if request.n > 1 and "n" not in slots and "seed" not in slots:
        raise BackendRefused(
            "This workflow has no slot for n or seed, so all its images would be the same. Send n=1.", param="n"
        )
    _workflow_fields(workflow, request)


def plan_prompts(
    workflow: Workflow, request: ImageRequest, files: Mapping[str, str], random_seed: int
) -> list[PromptPlan]:
    """Return the runs that make `request.n` images: one batch where the workflow has a slot for it, else a run each, with seeds counting up.

    `files`: ComfyUI's names of `image` and `mask`. `random_seed`: the seed of a request without one; the template's own would make the
    same image each time.
    """
    seed = request.seed if request.seed is not None else workflow.defaults.get("seed", random_seed)
    values = dict(workflow.defaults) | _values(request) | _workflow_fields(workflow, request) | dict(files)
    batch = "n" in workflow.slots
    seeds = [seed] if batch else [(seed + number) % 2**64 for number in range(request.n)]
    values["n"] = request.n
    known = "seed" in workflow.slots
    return [PromptPlan(_fill_slots(workflow, values | {"seed": one}), one if known else None) for one in seeds]


def request_field(workflow: Workflow, node: str, name: str) -> str | None:
    """Return the request's field that an input takes; None where it takes none."""
    slot = next((slot for slot, targets in workflow.slots.items() if NodeInput(node, name) in targets), None)
    return {"negative": "negative_prompt", "width": "size", "height": "size"}.get(slot, slot) if slot else None


def _values(request: ImageRequest) -> dict[str, Any]:
    values = {
        "prompt": request.prompt,
        "negative": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "guidance": request.guidance,
        "strength": request.strength,
    }
    return {name: value for name, value in values.items() if value is not None}


def _fill_slots(workflow: Workflow, values: Mapping[str, Any]) -> Graph:
    graph = copy.deepcopy(workflow.graph)
    for slot, targets in workflow.slots.items():
        if slot in values:
            for target in targets:
                graph[target.node]["inputs"][target.input] = values[slot]
    return graph


def _workflow_fields(workflow: Workflow, request: ImageRequest) -> dict[str, Any]:
    """Return the fields that only this workflow has. Raises BackendRefused for one of another type than the template's."""
    out: dict[str, Any] = {}
    for name, value in request.extra.items():
        template = workflow.template_value(workflow.slots[name][0])
        is_text = request.edit and isinstance(value, str) and isinstance(template, int | float)
        out[name] = _parse_form_value(value) if is_text else value
        if _type_name(template) not in (None, _type_name(out[name])):
            raise BackendRefused(f"{name} must have the type of {template!r}", param=name)
    return out


def _parse_form_value(value: str) -> Any:
    """Return a number or boolean of a form."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


def _type_name(value: Any) -> str | None:
    """Return the type of a value; None for a link, in whose place ComfyUI accepts any value."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None


# Checkpoints without a workflow


def checkpoint_workflow(checkpoint: str, request: ImageRequest) -> Workflow:
    """Return a plain workflow for a Stable Diffusion checkpoint: from text, from an image, or within a mask."""
    side = 1024 if "xl" in checkpoint.lower() else 512
    graph: Graph = {
        "model": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "prompt": _node("CLIPTextEncode", text="", clip=["model", 1]),
        "negative": _node("CLIPTextEncode", text="", clip=["model", 1]),
        "sampler": _node(
            "KSampler",
            model=["model", 0],
            positive=["prompt", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=0,
            steps=20,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "picture": _node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "output": _node("PreviewImage", images=["picture", 0]),  # not SaveImage: ComfyUI deletes temporary files
    }
    slots: dict[str, tuple[NodeInput, ...]] = {
        "prompt": (NodeInput("prompt", "text"),),
        "negative": (NodeInput("negative", "text"),),
        "seed": (NodeInput("sampler", "seed"),),
        "steps": (NodeInput("sampler", "steps"),),
        "guidance": (NodeInput("sampler", "cfg"),),
        "output": (NodeInput("output", ""),),
    }
    defaults: dict[str, Any] = {}
    if request.edit:
        _add_edit_nodes(graph, slots, request)
        defaults["strength"] = 1.0 if request.mask else 0.75
    else:
        graph["latent"] = _node("EmptyLatentImage", width=side, height=side, batch_size=1)
        slots |= {name: (NodeInput("latent", name),) for name in ("width", "height")}
        slots["n"] = (NodeInput("latent", "batch_size"),)
    return Workflow(checkpoint, graph, slots, defaults)


def _add_edit_nodes(graph: Graph, slots: dict[str, tuple[NodeInput, ...]], request: ImageRequest) -> None:
    graph["image"] = _node("LoadImage", image="")
    graph["latent"] = _node("VAEEncode", pixels=["image", 0], vae=["model", 2])
    slots["image"] = (NodeInput("image", "image"),)
    slots["strength"] = (NodeInput("sampler", "denoise"),)
    if request.width is not None:
        graph["scaled"] = _node(
            "ImageScale", image=["image", 0], upscale_method="lanczos", width=512, height=512, crop="center"
        )
        graph["latent"]["inputs"]["pixels"] = ["scaled", 0]
        slots |= {name: (NodeInput("scaled", name),) for name in ("width", "height")}
    if request.mask is not None:
        graph["mask"] = _node(
            "LoadImageMask", image="", channel="alpha"
        )  # ComfyUI inverts alpha, as OpenAI's masks need
        graph["masked"] = _node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
        graph["sampler"]["inputs"]["latent_image"] = ["masked", 0]
        slots["mask"] = (NodeInput("mask", "image"),)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
