"""`POST /v1/images/generations` and `POST /v1/images/edits`."""

from gateway.endpoints import Endpoint
from schemas.jobs import Capability
from schemas.openai.images import ImageEditRequest, ImageGenerationRequest


def _by_url(request: ImageGenerationRequest | ImageEditRequest) -> bool:
    return request.response_format == "url"


GENERATIONS = Endpoint(
    path="/v1/images/generations",
    capability=Capability.IMAGES,
    schema=ImageGenerationRequest,
    by_url=_by_url,
)
EDITS = Endpoint(
    path="/v1/images/edits",
    capability=Capability.IMAGES,
    schema=ImageEditRequest,
    files=("image", "mask"),
    by_url=_by_url,
)
