"""Graphs for InvokeAI 6, by the model's architecture: pure.

They are the graphs that InvokeAI's own page sends, without what a request cannot ask for. Nodes, fields and defaults are those of 6.14. Every
node is intermediate, so that galleries do not change, and no node that makes an image is answered from InvokeAI's cache: a cached image may
be another caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.backends.base import BackendRefused

JSON = dict[str, Any]

STABLE_DIFFUSION = frozenset({"sd-1", "sd-2", "sdxl"})
FLUX = "flux"
VARIANTS = frozenset({"normal", "inpaint", "schnell", "dev", ""})
"""FLUX Fill and depth models need images that a request has no field for."""
SIDES = {"sd-1": 512, "sd-2": 768, "sdxl": 1024, FLUX: 1024}
"""Side of the square images that a model was trained on, in pixels."""
MIN_SIDE = 64
MAX_SEED = 2**32 - 1
MASK_EDGE = 16
"""Pixels by which a masked area grows, and over which it fades out; InvokeAI's own default."""
DEFAULT_STRENGTH = 0.75
FLUX_STRENGTH_EXPONENT = 0.2
"""FLUX changes an image only in its first steps; InvokeAI spreads them over the range of strengths with this exponent."""


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model in InvokeAI's list."""

    key: str
    hash: str
    name: str
    base: str
    type: str
    variant: str = ""
    format: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that the operator set: `steps`, `cfg_scale`, `guidance`, `scheduler`, `width`, `height`."""

    @classmethod
    def of(cls, record: JSON) -> InstalledModel:
        names = ("key", "hash", "name", "base", "type", "variant", "format")
        return cls(
            **{name: str(record.get(name) or "") for name in names}, defaults=record.get("default_settings") or {}
        )

    @property
    def served(self) -> bool:
        """Whether there is a graph for the model."""
        return self.type == "main" and (self.base in STABLE_DIFFUSION or self.base == FLUX) and self.variant in VARIANTS

    @property
    def kontext(self) -> bool:
        """Whether the model is FLUX Kontext, which takes an image as a reference. Only the name shows it, to InvokeAI as well."""
        return self.base == FLUX and "kontext" in self.name.lower()

    @property
    def multiple(self) -> int:
        """The number of pixels that sides must be multiples of."""
        return 16 if self.base == FLUX else 8

    @property
    def side(self) -> tuple[int, int]:
        """Default width and height."""
        usual = SIDES[self.base]
        return self.defaults.get("width") or usual, self.defaults.get("height") or usual

    def field(self) -> JSON:
        """Return the model as a field of a node."""
        return {"key": self.key, "hash": self.hash, "name": self.name, "base": self.base, "type": self.type}


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The properties of an image. None: the model's default."""

    prompt: str
    width: int
    height: int
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    strength: float | None = None
    image: str | None = None
    """The name in InvokeAI of the image to edit."""
    mask: str | None = None
    """The name of an image that is white where the edit may paint, and black elsewhere."""


@dataclass(slots=True)
class Graph:
    """Nodes and edges. `output` is the node that makes the image, `seed` the node and field that take the seed."""

    output: str
    seed: tuple[str, str] | None = None
    nodes: dict[str, JSON] = field(default_factory=dict)
    edges: list[JSON] = field(default_factory=list)

    def add(self, node: str, kind: str, *, cached: bool = False, **fields: Any) -> None:
        self.nodes[node] = {"id": node, "type": kind, "is_intermediate": True, "use_cache": cached, **fields}

    def link(self, *ends: tuple[str, str]) -> None:
        """Add edges, given as pairs of `node.field`."""
        for source, destination in ends:
            self.edges.append({"source": _node_field(source), "destination": _node_field(destination)})

    def batch(self, batch: str, seeds: Sequence[int], *, keep: bool) -> JSON:
        """Return the body of `enqueue_batch`: one image for each seed. `keep`: the images show in InvokeAI's gallery."""
        nodes = self.nodes
        if keep:
            nodes = nodes | {self.output: nodes[self.output] | {"is_intermediate": False}}
        body: JSON = {"batch_id": batch, "graph": {"id": batch, "nodes": nodes, "edges": self.edges}, "runs": 1}
        if self.seed is None:
            body["runs"] = len(seeds)
        else:
            node, name = self.seed
            body["data"] = [[{"node_path": node, "field_name": name, "items": list(seeds)}]]
        return {"batch": body | {"origin": "nexus", "destination": "nexus"}}


def _node_field(end: str) -> JSON:
    node, _, name = end.partition(".")
    return {"node_id": node, "field": name}


def size_for(
    model: InstalledModel, requested: tuple[int, int] | None, image: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the width and height: the requested ones, else those of the image to edit, else the model's.

    An image with more pixels than the model makes at once is scaled down. Raises BackendRefused when the model cannot make the requested
    size.
    """
    step = model.multiple
    if requested is not None:
        nearest = [max(round(side / step) * step, MIN_SIDE) for side in requested]
        if nearest != list(requested):
            text = f"The sides of this model's images are multiples of {step}, and at least {MIN_SIDE}"
            raise BackendRefused(f"{text}; the nearest size is {nearest[0]}x{nearest[1]}.", param="size")
        return requested
    if image is None:
        return model.side
    width, height = image
    area = model.side[0] * model.side[1]
    scale = min(1.0, math.sqrt(area / (width * height)))
    return max(int(width * scale) // step * step, MIN_SIDE), max(int(height * scale) // step * step, MIN_SIDE)


def graph_for(model: InstalledModel, spec: ImageSpec, installed: Sequence[InstalledModel]) -> Graph:
    """Return the graph of an image. Raises BackendRefused, which names the missing parts, when FLUX lacks any."""
    if model.base == FLUX:
        return _flux(model, spec, installed)
    return _stable_diffusion(model, spec)


def _stable_diffusion(model: InstalledModel, spec: ImageSpec) -> Graph:
    graph = Graph("decode", ("noise", "seed"))
    if model.base == "sdxl":
        _sdxl_prompts(graph, model, spec)
    else:
        _sd_prompts(graph, model, spec)
    graph.add("noise", "noise", width=spec.width, height=spec.height)
    graph.add(
        "denoise",
        "denoise_latents",
        steps=spec.steps or model.defaults.get("steps") or 30,
        cfg_scale=spec.guidance or model.defaults.get("cfg_scale") or 7.5,
        scheduler=model.defaults.get("scheduler") or "dpmpp_3m_k",
    )
    graph.add("decode", "l2i", fp32=True)
    graph.link(
        ("loader.unet", "denoise.unet"),
        ("positive.conditioning", "denoise.positive_conditioning"),
        ("negative.conditioning", "denoise.negative_conditioning"),
        ("noise.noise", "denoise.noise"),
        ("denoise.latents", "decode.latents"),
        ("loader.vae", "decode.vae"),
    )
    if spec.image is not None:
        graph.add("encode", "i2l", fp32=True)
        _begin_with_image(graph, spec, lambda strength: 1 - strength)
        if spec.mask is not None:
            graph.link(("loader.unet", "area.unet"))
    return graph


def _sd_prompts(graph: Graph, model: InstalledModel, spec: ImageSpec) -> None:
    graph.add("loader", "main_model_loader", cached=True, model=model.field())
    for node, prompt in (("positive", spec.prompt), ("negative", spec.negative_prompt)):
        graph.add(node, "compel", cached=True, prompt=prompt)
        graph.link(("loader.clip", f"{node}.clip"))


def _sdxl_prompts(graph: Graph, model: InstalledModel, spec: ImageSpec) -> None:
    graph.add("loader", "sdxl_model_loader", cached=True, model=model.field())
    for node, prompt in (("positive", spec.prompt), ("negative", spec.negative_prompt)):
        graph.add(node, "sdxl_compel_prompt", cached=True, prompt=prompt, style=prompt)
        graph.link(("loader.clip", f"{node}.clip"), ("loader.clip2", f"{node}.clip2"))


def _flux(model: InstalledModel, spec: ImageSpec, installed: Sequence[InstalledModel]) -> Graph:
    graph = Graph("decode", ("denoise", "seed"))
    schnell = model.variant == "schnell"
    graph.add("loader", "flux_model_loader", cached=True, model=model.field(), **_flux_parts(model, installed))
    graph.add("positive", "flux_text_encoder", cached=True, prompt=spec.prompt)
    graph.add(
        "denoise",
        "flux_denoise",
        width=spec.width,
        height=spec.height,
        num_steps=spec.steps or model.defaults.get("steps") or (4 if schnell else 28),
        guidance=spec.guidance or model.defaults.get("guidance") or 4.0,
    )
    graph.add("decode", "flux_vae_decode")
    graph.link(
        ("loader.clip", "positive.clip"),
        ("loader.t5_encoder", "positive.t5_encoder"),
        ("loader.max_seq_len", "positive.t5_max_seq_len"),
        ("loader.transformer", "denoise.transformer"),
        ("positive.conditioning", "denoise.positive_text_conditioning"),
        ("denoise.latents", "decode.latents"),
        ("loader.vae", "decode.vae"),
    )
    if spec.image is not None and model.kontext:
        graph.add("reference", "flux_kontext", image={"image_name": spec.image})
        graph.link(("reference.kontext_cond", "denoise.kontext_conditioning"), ("loader.vae", "denoise.controlnet_vae"))
    elif spec.image is not None:
        graph.add("encode", "flux_vae_encode")
        _begin_with_image(graph, spec, lambda strength: 1 - strength**FLUX_STRENGTH_EXPONENT)
    return graph


def _flux_parts(model: InstalledModel, installed: Sequence[InstalledModel]) -> JSON:
    """Return the text encoders and the VAE of a FLUX model. Of several, the first by name."""
    kinds: dict[str, tuple[str, Callable[[InstalledModel], bool]]] = {
        "t5_encoder_model": ("a T5 encoder", lambda part: part.type == "t5_encoder"),
        "clip_embed_model": (
            "CLIP-L (clip_embed)",
            lambda part: part.type == "clip_embed" and part.variant in ("large", ""),
        ),
        "vae_model": ("a FLUX VAE", lambda part: part.type == "vae" and part.base == FLUX),
    }
    parts: JSON = {}
    missing: list[str] = []
    for name, (words, fits) in kinds.items():
        found = next((part for part in sorted(installed, key=lambda part: part.name) if fits(part)), None)
        if found is None:
            missing.append(words)
        else:
            parts[name] = found.field()
    if not missing:
        return parts
    if model.format == "sdnq_quantized":
        return {}  # a pipeline folder has its own parts
    raise BackendRefused(
        f"InvokeAI lacks what {model.name} needs: {', '.join(missing)}; install it in InvokeAI's model manager",
        param="model",
    )


def _begin_with_image(graph: Graph, spec: ImageSpec, start: Callable[[float], float]) -> None:
    """Add the nodes that begin with an image, which `encode` takes; with a mask, only the masked area changes."""
    size: JSON = {"width": spec.width, "height": spec.height}
    graph.add("picture", "img_resize", image={"image_name": spec.image}, **size)
    usual = DEFAULT_STRENGTH if spec.mask is None else 1.0
    strength = usual if spec.strength is None else spec.strength
    graph.nodes["denoise"]["denoising_start"] = round(start(strength), 6)
    graph.link(("picture.image", "encode.image"), ("loader.vae", "encode.vae"), ("encode.latents", "denoise.latents"))
    if spec.mask is None:
        return
    graph.add("mask", "img_resize", image={"image_name": spec.mask}, **size)
    graph.add("stays", "img_lerp", min=255, max=0)  # InvokeAI's masks are black where it paints
    graph.add("area", "create_gradient_mask", edge_radius=MASK_EDGE, fp32=True)
    graph.add("edge", "expand_mask_with_fade", fade_size_px=MASK_EDGE)
    graph.add("paste", "img_paste")
    graph.link(
        ("mask.image", "stays.image"),
        ("stays.image", "area.mask"),
        ("picture.image", "area.image"),
        ("loader.vae", "area.vae"),
        ("area.denoise_mask", "denoise.denoise_mask"),
        ("area.expanded_mask_area", "edge.mask"),
        ("picture.image", "paste.base_image"),
        ("decode.image", "paste.image"),
        ("edge.image", "paste.mask"),
    )
    graph.output = "paste"
