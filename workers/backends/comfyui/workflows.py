"""An operator's ComfyUI workflows as models: where a request's fields go in a graph. Pure, apart from reading the files.

A workflow is the JSON of ComfyUI's "Export (API)": `{"3": {"class_type": "KSampler", "inputs": {…}, "_meta": {"title": …}}}`.
Its slots come from the first of these that names any:

- a file `NAME.slots.json` beside it: `{"prompt": {"node": "6", "input": "text"}, "seed": {"node": "3"}, "defaults": {"steps": 20}}`;
- titles of nodes: `nexus:prompt`, or `nexus:seed.noise_seed` where the input is not the usual one; a title may name several slots;
- the links of the graph: from a sampler to its prompts, its empty latent, its loaded image.

Slots are `prompt`, `negative`, `size` (or `width`, `height`), `n` (a batch), `seed`, `steps`, `guidance`, `strength`, `image`, `mask` and `output` (the node
whose images are the result). Any other name is a field of the request that only this workflow has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON = dict[str, Any]
Graph = dict[str, JSON]
FileStamp = tuple[tuple[int, int, int] | None, ...]

TITLE = re.compile(r"nexus:(\w+)(?:\.(\w+))?")
ALIASES = {
    "negative_prompt": "negative",
    "batch": "n",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "denoise": "strength",
}
VALUE = ("value",)
USUAL_INPUTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "prompt": (("text",), ("prompt",), ("text_g", "text_l"), ("clip_l", "t5xxl"), ("string",), VALUE),
    "width": (("width",), VALUE),
    "height": (("height",), VALUE),
    "n": (("batch_size",), ("amount",), VALUE),
    "seed": (("seed",), ("noise_seed",), VALUE),
    "steps": (("steps",), VALUE),
    "guidance": (("guidance",), ("cfg",), VALUE),
    "strength": (("denoise",), ("strength",), VALUE),
    "image": (("image",),),
    "mask": (("mask",), ("image",)),
    "output": ((),),
}
"""The inputs of a node that a slot may stand for, in order of preference."""


@dataclass(frozen=True, slots=True)
class NodeInput:
    """An input of a node."""

    node: str
    input: str


@dataclass(frozen=True, slots=True)
class Workflow:
    """A graph and its slots."""

    name: str
    graph: Graph
    slots: Mapping[str, tuple[NodeInput, ...]]
    """The inputs of each slot: all of them get its value."""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def template_value(self, target: NodeInput) -> Any:
        """Return the template's value of an input."""
        return self.graph[target.node]["inputs"].get(target.input)


class WorkflowFiles:
    """The workflows of a folder (each `NAME.json` in it) and of a file, read again when they change.

    A file that is not a workflow is a problem; the others are served. The constructor raises ValueError, which names the files at fault, when
    the folder is missing or holds no workflow.
    """

    def __init__(self, folder: str, file: str) -> None:
        self._folder = folder
        self._file = file
        self._read: dict[Path, tuple[FileStamp, Workflow | ValueError]] = {}
        self.workflows: dict[str, Workflow] = {}
        self.problems: tuple[str, ...] = ()
        if folder and not Path(folder).is_dir():
            raise ValueError(f"workflows={folder}: the folder does not exist")
        self.refresh()
        if (folder or file) and not self.workflows:
            raise ValueError(
                "; ".join(self.problems[:3]) or f"workflows={folder}: the folder holds no workflow (NAME.json)"
            )

    def __bool__(self) -> bool:
        """Return whether the operator named a folder or a file."""
        return bool(self._folder or self._file)

    def refresh(self) -> None:
        """Read the files that are new or have changed."""
        read: dict[Path, tuple[FileStamp, Workflow | ValueError]] = {}
        for path in self._paths():
            stamp = _file_stamp(path)
            before = self._read.get(path)
            read[path] = before if before is not None and before[0] == stamp else (stamp, _load_or_error(path))
        self._read = read
        found = [loaded for _, loaded in read.values()]
        self.workflows = {one.name: one for one in found if isinstance(one, Workflow)}
        self.problems = tuple(str(one) for one in found if isinstance(one, ValueError))

    def _paths(self) -> list[Path]:
        paths = [Path(self._file)] if self._file else []
        if self._folder:
            paths += sorted(path for path in Path(self._folder).glob("*.json") if not path.name.endswith(".slots.json"))
        return paths


def _load_or_error(path: Path) -> Workflow | ValueError:
    try:
        return load_workflow(path)
    except ValueError as error:
        return error


def _file_stamp(path: Path) -> FileStamp:
    """Return a value that changes when the workflow or its slots file changes."""
    stamps: list[tuple[int, int, int] | None] = []
    for one in (path, path.with_name(f"{path.stem}.slots.json")):
        try:
            status = one.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(stamps)


def load_workflow(path: Path) -> Workflow:
    """Return the workflow of a file. Raises ValueError."""
    try:
        return parse_workflow(path.stem, _object(path), _sidecar(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_workflow(name: str, graph: JSON, sidecar: JSON | None = None) -> Workflow:
    """Return the workflow of a graph and its slots file. Raises ValueError."""
    if not graph or not all(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        raise ValueError("the file is not a workflow in API format; export it in ComfyUI with Workflow, Export (API)")
    graph = {str(key): node | {"inputs": node.get("inputs") or {}} for key, node in graph.items()}
    sidecar = dict(sidecar or {})
    defaults = sidecar.pop("defaults", {})
    slots = _slots_from_file(graph, sidecar) or _slots_from_titles(graph) or detect_slots(graph)
    if "prompt" not in slots:
        raise ValueError("no node takes the prompt; give the node that should take it the title nexus:prompt")
    if isinstance(defaults, dict):
        return Workflow(name, graph, slots, _checked_defaults(defaults))
    raise ValueError("defaults in the slots file must be a JSON object")


def _object(path: Path) -> JSON:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"the file cannot be read: {error}") from error
    if isinstance(value, dict):
        return value
    raise ValueError("the file does not hold a JSON object")


def _sidecar(path: Path) -> JSON | None:
    beside = path.with_name(f"{path.stem}.slots.json")
    return _object(beside) if beside.exists() else None


def _checked_defaults(defaults: JSON) -> JSON:
    out: JSON = {ALIASES.get(name, name): value for name, value in defaults.items()}
    size = out.pop("size", None)
    if size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", str(size))
        if match is None:
            raise ValueError("the default size must be WIDTHxHEIGHT")
        out |= {"width": int(match[1]), "height": int(match[2])}
    return out


def _slot_names(name: str) -> tuple[str, ...]:
    return ("width", "height") if name == "size" else (ALIASES.get(name, name),)


def _slots_from_file(graph: Graph, sidecar: JSON) -> dict[str, tuple[NodeInput, ...]]:
    slots: dict[str, tuple[NodeInput, ...]] = {}
    for key, value in sidecar.items():
        for place in value if isinstance(value, list) else [value]:
            if not isinstance(place, dict) or "node" not in place:
                raise ValueError(f'the slot {key} must look like {{"node": "6", "input": "text"}}')
            for name in _slot_names(key):
                slots[name] = slots.get(name, ()) + _targets(graph, name, str(place["node"]), place.get("input"))
    return slots


def _slots_from_titles(graph: Graph) -> dict[str, tuple[NodeInput, ...]]:
    slots: dict[str, tuple[NodeInput, ...]] = {}
    for node, content in graph.items():
        for key, given in TITLE.findall(str((content.get("_meta") or {}).get("title", ""))):
            for name in _slot_names(key):
                slots[name] = slots.get(name, ()) + _targets(graph, name, node, given or None)
    return slots


def _targets(graph: Graph, name: str, node: str, given: str | None) -> tuple[NodeInput, ...]:
    if node not in graph:
        raise ValueError(f"the slot {name} names the node {node}, which the workflow does not have")
    inputs = graph[node]["inputs"]
    if given is not None:
        if given not in inputs:
            raise ValueError(
                f"the slot {name} names the input {given}, which node {node} does not have; its inputs: {', '.join(inputs) or 'none'}"
            )
        return (NodeInput(node, given),)
    found = _usual(name, inputs)
    if found is None:
        raise ValueError(
            f"the slot {name} does not say which input of node {node} it fills; title the node nexus:{name}.INPUT, where INPUT is one of {', '.join(inputs)}"
        )
    return tuple(NodeInput(node, one) for one in found) or (NodeInput(node, ""),)


def _usual(name: str, inputs: JSON) -> tuple[str, ...] | None:
    groups = USUAL_INPUTS.get("prompt" if name == "negative" else name, (VALUE, ("text",), ("string",)))
    return next((group for group in groups if all(one in inputs for one in group)), None)


# Slots by links


def detect_slots(graph: Graph) -> dict[str, tuple[NodeInput, ...]]:
    """Return the slots that the links of the samplers show. Doubtful ones are left out."""
    slots: dict[str, list[NodeInput]] = {}
    samplers = sampler_nodes(graph)
    for sampler in samplers:
        prompts = _texts(graph, _conditioning(graph, sampler, "positive"))
        slots.setdefault("prompt", []).extend(prompts)
        negatives = _texts(graph, _conditioning(graph, sampler, "negative"))
        slots.setdefault("negative", []).extend(one for one in negatives if one not in prompts)
        slots.setdefault("seed", []).extend(_literals(graph, sampler, ("seed", "noise_seed"), via="noise"))
        _latent(graph, sampler, slots)
    if len(samplers) == 1:  # two samplers divide the steps in a way that only the operator knows
        slots["steps"] = _literals(graph, samplers[0], ("steps",), via="sigmas")
        slots["guidance"] = _guidance(graph, samplers[0])
        if slots.get("image"):
            slots["strength"] = _literals(graph, samplers[0], ("denoise",), via="sigmas")
    return {name: tuple(dict.fromkeys(targets)) for name, targets in slots.items() if targets}


def sampler_nodes(graph: Graph) -> list[str]:
    """Return the sampler nodes, which generate images in steps."""
    return [node for node, content in graph.items() if _link(content["inputs"].get("latent_image")) is not None]


def _link(value: Any) -> tuple[str, int] | None:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None


def _upstream(graph: Graph, link: tuple[str, int] | None) -> Iterator[str]:
    """Yield the nodes behind a link, nearest first. Behind a node that passes both prompts on, follow only the linked prompt."""
    waiting, seen = [link] if link else [], set()
    while waiting:
        node, output = waiting.pop(0)
        if (node, output) in seen or node not in graph:
            continue
        seen.add((node, output))
        yield node
        inputs = graph[node]["inputs"]
        if "positive" in inputs and "negative" in inputs and output < 2:
            inputs = {"followed": inputs["negative" if output else "positive"]}
        waiting += [further for further in map(_link, inputs.values()) if further is not None]


def _conditioning(graph: Graph, sampler: str, which: str) -> tuple[str, int] | None:
    inputs = graph[sampler]["inputs"]
    guider = _link(inputs.get("guider"))
    if guider is not None and guider[0] in graph:
        inputs = graph[guider[0]]["inputs"]
        if which == "positive" and which not in inputs:
            which = "conditioning"
    return _link(inputs.get(which))


def _texts(graph: Graph, link: tuple[str, int] | None) -> list[NodeInput]:
    targets: list[NodeInput] = []
    for node in _upstream(graph, link):
        template_value = {name: value for name, value in graph[node]["inputs"].items() if isinstance(value, str)}
        targets += [NodeInput(node, name) for name in _usual("prompt", template_value) or ()]
    return targets


def _literals(graph: Graph, node: str, names: tuple[str, ...], via: str = "") -> list[NodeInput]:
    """Return the input that holds the number `names` of a node: its own, that of a linked node, or one behind the link `via`."""
    inputs = graph[node]["inputs"]
    for name in names:
        link = _link(inputs.get(name))
        if link is not None and link[0] in graph:
            return _literals(graph, link[0], ("value", "seed", "int", "number"))
        if _is_number(inputs.get(name)):
            return [NodeInput(node, name)]
    link = _link(inputs.get(via))
    return _literals(graph, link[0], names) if link is not None and link[0] in graph else []


def _latent(graph: Graph, sampler: str, slots: dict[str, list[NodeInput]]) -> None:
    """Add the slots of the latent that the sampler starts from: an empty one of some size, or an image."""
    for node in _upstream(graph, _link(graph[sampler]["inputs"]["latent_image"])):
        kind = str(graph[node]["class_type"])
        if kind == "LoadImage":
            slots.setdefault("image", []).append(NodeInput(node, "image"))
        elif "Latent" in kind and "Empty" in kind:
            for name, names in (("width", ("width",)), ("height", ("height",)), ("n", ("batch_size",))):
                slots.setdefault(name, []).extend(_literals(graph, node, names))


def _guidance(graph: Graph, sampler: str) -> list[NodeInput]:
    """Return FLUX's own guidance input where there is one, since `cfg` must then not change; else `cfg`."""
    for node in _upstream(graph, _conditioning(graph, sampler, "positive")):
        if _is_number(graph[node]["inputs"].get("guidance")):
            return [NodeInput(node, "guidance")]
    return _literals(graph, sampler, ("cfg",), via="guider")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
