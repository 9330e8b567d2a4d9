"""`POST /v1/rerank`, in the shape of Jina and Cohere."""

from gateway.endpoints import Endpoint, never_streamed
from schemas.jobs import Capability
from schemas.openai.rerank import RerankRequest

ENDPOINT = Endpoint(path="/v1/rerank", capability=Capability.RERANK, schema=RerankRequest, stream_type=never_streamed)
