"""`POST /v1/audio/speech`."""

from gateway.endpoints import SSE, Endpoint
from schemas.jobs import Capability
from schemas.openai.speech import SPEECH_CONTENT_TYPES, SpeechRequest


def _stream_type(request: SpeechRequest) -> bytes:
    """Sound is always passed on as it is made."""
    return SSE if request.stream_format == "sse" else SPEECH_CONTENT_TYPES[request.response_format or "mp3"].encode()


ENDPOINT = Endpoint(
    path="/v1/audio/speech", capability=Capability.SPEECH, schema=SpeechRequest, stream_type=_stream_type
)
