"""`POST /v1/chat/completions`."""

from gateway.endpoints import Endpoint
from schemas.jobs import Capability
from schemas.openai.chat import ChatRequest

ENDPOINT = Endpoint(path="/v1/chat/completions", capability=Capability.CHAT, schema=ChatRequest)
