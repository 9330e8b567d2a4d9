"""What a workflow's slots can be told, as a descriptor: pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schemas.descriptors import JSON, EndpointDescriptor
from schemas.parameters import images
from schemas.parameters.images import PictureOptions
from workers.backends.comfyui.node_checks import Classes, input_choices
from workers.backends.comfyui.prompt_builder import IMPLICIT_SLOTS, REQUEST_FIELDS
from workers.backends.comfyui.workflows import Workflow

COMMON_SLOTS = frozenset(
    {"prompt", "negative", "width", "height", "n", "seed", "steps", "guidance", "strength", "image", "mask", "output"}
)
CHECKPOINT_DEFAULTS: Mapping[str, Any] = {"steps": 20, "guidance": 7.0, "strength": 0.75}
MAX_CHOICES = 300
MAX_DEFAULT = 500
"""Characters of a template's text that is shown as a default."""


def describe_workflow(workflow: Workflow, classes: Classes) -> dict[str, EndpointDescriptor]:
    """Return the endpoints of a workflow: one with an image edits it, any other generates images."""
    slots = workflow.slots
    known = {REQUEST_FIELDS.get(name, name) for name in slots if name not in IMPLICIT_SLOTS}
    options = PictureOptions(
        fields=known & images.ALL_FIELDS,
        defaults=_defaults(workflow),
        images=images.MAX_IMAGES if "n" in slots or "seed" in slots else 1,
        extra={name: _own_field(workflow, name, classes) for name in slots if name not in COMMON_SLOTS},
    )
    if "image" not in slots:
        return {"/v1/images/generations": images.generations(options)}
    return {"/v1/images/edits": images.edits(options, mask=False, mask_required="mask" in slots)}


def describe_checkpoint(name: str) -> dict[str, EndpointDescriptor]:
    """Return the endpoints of a checkpoint without a workflow."""
    side = 1024 if "xl" in name.lower() else 512
    options = PictureOptions(defaults={**CHECKPOINT_DEFAULTS, "size": f"{side}x{side}"})
    return {"/v1/images/generations": images.generations(options), "/v1/images/edits": images.edits(options)}


def _defaults(workflow: Workflow) -> dict[str, Any]:
    """Return the values of a request that gives none: those of the slots file, else the template's."""
    found: dict[str, Any] = {}
    for name, targets in workflow.slots.items():
        value = workflow.defaults.get(name, workflow.template_value(targets[0]))
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    if {"width", "height"} <= set(found):
        found["size"] = f"{int(found['width'])}x{int(found['height'])}"
    return found


def _own_field(workflow: Workflow, name: str, classes: Classes) -> JSON:
    """Return the schema of a slot that only this workflow has. Its type is the template's."""
    target = workflow.slots[name][0]
    template = workflow.template_value(target)
    schema: JSON = {"title": name.replace("_", " ").capitalize()[:100]}
    if isinstance(template, bool):
        schema["type"] = "boolean"
    elif isinstance(template, int | float):
        schema |= {"type": "number"} | ({"x-nexus-step": 1} if isinstance(template, int) else {})
    elif isinstance(template, str):
        schema["type"] = "string"
        choices = input_choices(classes.get(str(workflow.graph[target.node]["class_type"])), target.input)
        if choices and len(choices) <= MAX_CHOICES:
            schema["enum"] = choices
    default = workflow.defaults.get(name, template)
    is_short = not isinstance(default, str) or len(default) <= MAX_DEFAULT
    return schema | ({"default": default} if "type" in schema and is_short else {})
