"""What an installed model can be told, as a descriptor: pure."""

from __future__ import annotations

from schemas.descriptors import EndpointDescriptor
from schemas.parameters import images
from schemas.parameters.images import PictureOptions
from workers.backends.invokeai.graphs import DEFAULT_STRENGTH, FLUX, MAX_SEED, MIN_SIDE, InstalledModel


def describe_model(model: InstalledModel) -> dict[str, EndpointDescriptor]:
    """Return the endpoints of a main model."""
    fields = {"size", "seed", "steps", "guidance", "negative_prompt", "strength"}
    if model.base == FLUX:
        fields.discard("negative_prompt")
    if model.variant == "schnell":
        fields.discard("guidance")
    if model.kontext:
        fields.discard("strength")
    width, height = model.side
    guidance = model.defaults.get("guidance" if model.base == FLUX else "cfg_scale")
    defaults = {
        "size": f"{width}x{height}",
        "steps": model.defaults.get("steps"),
        "guidance": guidance,
        "strength": DEFAULT_STRENGTH,
    }
    options = PictureOptions(
        fields=frozenset(fields),
        defaults={name: value for name, value in defaults.items() if value is not None},
        side={"minimum": MIN_SIDE, "multipleOf": model.multiple},
        max_seed=MAX_SEED,
        min_guidance=1.0,
    )
    edits = images.edits(options, mask=not model.kontext)
    return {"/v1/images/generations": images.generations(options), "/v1/images/edits": edits}
