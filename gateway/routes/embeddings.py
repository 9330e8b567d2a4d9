"""`POST /v1/embeddings`."""

from gateway.endpoints import Endpoint, never_streamed
from schemas.jobs import Capability
from schemas.openai.embeddings import EmbeddingsRequest

ENDPOINT = Endpoint(
    path="/v1/embeddings",
    capability=Capability.EMBEDDINGS,
    schema=EmbeddingsRequest,
    stream_type=never_streamed,
)
