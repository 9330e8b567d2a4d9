"""`POST /v1/audio/transcriptions` and `POST /v1/audio/translations`."""

from gateway.endpoints import Endpoint, never_streamed
from schemas.jobs import Capability
from schemas.openai.transcriptions import TranscriptionRequest, TranslationRequest

TRANSCRIPTIONS = Endpoint(
    path="/v1/audio/transcriptions",
    capability=Capability.TRANSCRIPTIONS,
    schema=TranscriptionRequest,
    files=("file",),
)
TRANSLATIONS = Endpoint(
    path="/v1/audio/translations",
    capability=Capability.TRANSCRIPTIONS,
    schema=TranslationRequest,
    files=("file",),
    stream_type=never_streamed,
)
