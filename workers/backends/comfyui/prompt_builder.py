"""A request for pictures as graphs that ComfyUI runs: pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from workers.adapter_kit.images.responses import ImageRequest
from workers.backends.base import BackendRefused
from workers.backends.comfyui.workflows import Graph, NodeInput, Workflow

FIELDS = {"negative": "negative_prompt", "width": "size", "height": "size", "image": "edit"}
"""What a slot is called in a request, where that differs."""
OWN = frozenset({"prompt", "n", "output"})


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One run of a graph."""

    graph: Graph
    seed: int | None
    """Of its first picture, where a slot sets it."""


def check(workflow: Workflow, request: ImageRequest) -> None:
    """Raises BackendRefused for whatever the workflow has no slot for, and for what it needs and does not get."""
    slots = workflow.slots
    request.require_supported(*dict.fromkeys(FIELDS.get(name, name) for name in slots if name not in OWN))
    if "image" in slots and not request.edit:
        raise BackendRefused("this workflow changes a picture: send it one at /v1/images/edits", param="image")
    if "mask" in slots and request.mask is None:
        raise BackendRefused("this workflow needs a mask", param="mask")
    if request.n > 1 and "n" not in slots and "seed" not in slots:
        raise BackendRefused(
            "this workflow has neither a slot for n nor one for the seed: all its pictures would be the same", param="n"
        )
    _extras(workflow, request)


def plans(workflow: Workflow, request: ImageRequest, files: Mapping[str, str], fresh_seed: int) -> list[PromptPlan]:
    """The runs that make `request.n` pictures: one with a batch where there is a slot for it, else one for each, seeds counting up.

    `files` are the names under which ComfyUI knows `image` and `mask`. `fresh_seed` is taken where the caller gives none, since
    the template's own would make the same picture each time.
    """
    seed = request.seed if request.seed is not None else workflow.defaults.get("seed", fresh_seed)
    values = dict(workflow.defaults) | _values(request) | _extras(workflow, request) | dict(files)
    batch = "n" in workflow.slots
    seeds = [seed] if batch else [(seed + number) % 2**64 for number in range(request.n)]
    values["n"] = request.n
    known = "seed" in workflow.slots
    return [PromptPlan(_filled(workflow, values | {"seed": one}), one if known else None) for one in seeds]


def field_of(workflow: Workflow, node: str, name: str) -> str | None:
    """The request's field that goes to an input; None where none does."""
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


def _filled(workflow: Workflow, values: Mapping[str, Any]) -> Graph:
    graph = copy.deepcopy(workflow.graph)
    for slot, targets in workflow.slots.items():
        if slot in values:
            for target in targets:
                graph[target.node]["inputs"][target.input] = values[slot]
    return graph


def _extras(workflow: Workflow, request: ImageRequest) -> dict[str, Any]:
    """The fields that only this workflow knows. Raises BackendRefused for one of another kind than the template's."""
    out: dict[str, Any] = {}
    for name, value in request.extra.items():
        template = workflow.literal(workflow.slots[name][0])
        is_text = request.edit and isinstance(value, str) and isinstance(template, int | float)
        out[name] = _from_text(value) if is_text else value
        if _kind(template) not in (None, _kind(out[name])):
            raise BackendRefused(f"{name} must be of the kind of {template!r}", param=name)
    return out


def _from_text(value: str) -> Any:
    """A form's number or boolean."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


def _kind(value: Any) -> str | None:
    """None: a link, in whose place ComfyUI takes anything that fits."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None


# Without a workflow of the operator's own


def checkpoint_workflow(checkpoint: str, request: ImageRequest) -> Workflow:
    """The plainest workflow for a Stable Diffusion checkpoint: from text, from a picture, or within a mask."""
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
        "output": _node("PreviewImage", images=["picture", 0]),  # not SaveImage: what is temporary is cleaned up
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
        _from_picture(graph, slots, request)
        defaults["strength"] = 1.0 if request.mask else 0.75
    else:
        graph["latent"] = _node("EmptyLatentImage", width=side, height=side, batch_size=1)
        slots |= {name: (NodeInput("latent", name),) for name in ("width", "height")}
        slots["n"] = (NodeInput("latent", "batch_size"),)
    return Workflow(checkpoint, graph, slots, defaults)


def _from_picture(graph: Graph, slots: dict[str, tuple[NodeInput, ...]], request: ImageRequest) -> None:
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
        )  # its alpha channel comes inverted, as OpenAI's
        graph["masked"] = _node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
        graph["sampler"]["inputs"]["latent_image"] = ["masked", 0]
        slots["mask"] = (NodeInput("mask", "image"),)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
