"""`POST /v1/completions` (legacy)."""

from gateway.endpoints import Endpoint
from schemas.jobs import Capability
from schemas.openai.completions import CompletionRequest

ENDPOINT = Endpoint(path="/v1/completions", capability=Capability.COMPLETIONS, schema=CompletionRequest)
