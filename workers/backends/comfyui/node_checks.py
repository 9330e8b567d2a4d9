"""Whether a ComfyUI server has the node classes and model files of a workflow: pure.

ComfyUI describes the inputs of each node class (`GET /object_info/CLASS`). A workflow is checked as ComfyUI checks it before it runs: the server must have
every class, and every model file that a node before an output names. Other values are left to ComfyUI, since custom nodes may accept more than
they list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from workers.backends.comfyui.workflows import NodeInput, Workflow

JSON = dict[str, Any]
Classes = Mapping[str, JSON | None]
"""Descriptions of node classes; None for a class that the server lacks. A class that is not in it is not checked."""

MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".gguf", ".onnx", ".pkl")
MAX_NAMED = 3
"""Faults, and similar files of the server, that one problem names."""


def node_classes(workflow: Workflow) -> frozenset[str]:
    """Return the classes of the workflow's nodes."""
    return frozenset(str(node["class_type"]) for node in workflow.graph.values())


def lists_files(info: JSON) -> bool:
    """Return whether a node class lists model files, which may be added while ComfyUI runs."""
    inputs = info.get("input")
    fields = [name for group in ("required", "optional") for name in ((inputs or {}).get(group) or {})]
    return any(_are_model_files(input_choices(info, name)) for name in fields)


def _are_model_files(choices: list[str] | None) -> bool:
    return choices is not None and (not choices or any(one.lower().endswith(MODEL_FILES) for one in choices))


def workflow_problem(workflow: Workflow, classes: Classes) -> str | None:
    """Return a sentence about what the server lacks for a workflow; None where it can run the workflow."""
    faults = [*_missing_classes(workflow, classes)] or [*_missing_files(workflow, classes)]
    if not faults:
        return None
    more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
    return f"The workflow {workflow.name!r} is not served: {'; '.join(faults[:MAX_NAMED])}{more}."


def _missing_classes(workflow: Workflow, classes: Classes) -> Iterator[str]:
    missing: dict[str, str] = {}
    for key, node in workflow.graph.items():
        kind = str(node["class_type"])
        if kind in classes and classes[kind] is None:
            missing.setdefault(kind, key)
    for kind, key in missing.items():
        yield f"ComfyUI lacks the node class {kind} (node {key}); install the custom nodes that bring it, and restart ComfyUI"


def _missing_files(workflow: Workflow, classes: Classes) -> Iterator[str]:
    filled = {target for targets in workflow.slots.values() for target in targets}
    for key in _reachable(workflow, classes):
        node = workflow.graph[key]
        for name, value in node["inputs"].items():
            if not isinstance(value, str) or not value.lower().endswith(MODEL_FILES) or NodeInput(key, name) in filled:
                continue
            choices = input_choices(classes.get(str(node["class_type"])), name)
            if choices is not None and value not in choices:
                near = get_close_matches(value, choices, MAX_NAMED) or choices[:MAX_NAMED]
                has = f"it has {', '.join(near)}" if near else "it has none"
                yield f"ComfyUI lacks the file {value} ({name} of {node['class_type']}, node {key}); {has}"


def _reachable(workflow: Workflow, classes: Classes) -> list[str]:
    """Return the nodes that ComfyUI runs: the outputs and all nodes before them; all nodes where no class is known as an output."""
    graph = workflow.graph
    outputs = [key for key, node in graph.items() if (classes.get(str(node["class_type"])) or {}).get("output_node")]
    if not outputs:
        return list(graph)
    seen: dict[str, None] = {}
    while outputs:
        key = outputs.pop()
        if key in seen or key not in graph:
            continue
        seen[key] = None
        outputs += [str(value[0]) for value in graph[key]["inputs"].values() if isinstance(value, list) and value]
    return list(seen)


def input_choices(info: JSON | None, name: str) -> list[str] | None:
    """Return the values that an input lists; None where it lists none, or takes uploads or remote values."""
    inputs = (info or {}).get("input")
    for group in ("required", "optional"):
        fields = inputs.get(group) if isinstance(inputs, dict) else None
        spec = fields.get(name) if isinstance(fields, dict) else None
        if isinstance(spec, list) and spec:
            options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
            if any(str(key).endswith("_upload") or key in ("remote", "multi_select") for key in options):
                return None
            values = spec[0] if isinstance(spec[0], list) else options.get("options") if spec[0] == "COMBO" else None
            return [str(value) for value in values] if isinstance(values, list) else None
    return None
