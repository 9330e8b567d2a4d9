"""Models, voices, and what workers do with models."""

from __future__ import annotations

from gateway.openapi.operation import Operation, answer
from gateway.openapi.operations.common import MODEL, PREFERENCES, STREAM, inferred
from gateway.openapi.shapes.media import ModelJobDone
from gateway.openapi.shapes.operators import Model, ModelList, SpeechModelList, VoiceList
from schemas.model_jobs import ModelJobRequest


def _job(verb: str, summary: str, description: str) -> Operation:
    return Operation(
        id=f"{verb}Model",
        tag="operation",
        scope="admin",
        works=True,
        summary=summary,
        description=description + " With `stream: true` the progress comes as events.",
        body=ModelJobRequest,
        examples={"A model": {"model": "llama3.2:1b"}},
        answers=inferred(ModelJobDone, "It is done.", STREAM),
        errors={404: "No live worker of that name manages models (`worker_not_found`), or there is no such model."},
        parameters=PREFERENCES,
    )


OPERATIONS = {
    "GET /v1/models": Operation(
        id="listModels",
        tag="models",
        summary="List models",
        description="Return the models that can be used now, and the aliases for them.",
        answers=answer(ModelList, "The models."),
    ),
    "GET /v1/models/{model_id}": Operation(
        id="getModel",
        tag="models",
        summary="Get a model",
        description="Return one model or alias, also one that no worker serves now.",
        answers=answer(Model, "The model."),
        errors={404: "There is no such model (`model_not_found`)."},
        parameters={
            "model_id": {"description": "The model's id; `:` and `/` in it may be percent-encoded.", "example": MODEL}
        },
    ),
    "GET /v1/audio/voices": Operation(
        id="listVoices",
        tag="models",
        summary="List voices",
        description="Return the voices of all models that speak now, as Open WebUI reads them.",
        answers=answer(VoiceList, "The voices."),
    ),
    "GET /v1/audio/models": Operation(
        id="listSpeechModels",
        tag="models",
        summary="List models that speak",
        description="Return the models that speak now and the aliases for them.",
        answers=answer(SpeechModelList, "The models."),
    ),
    "POST /v1/models/pull": _job("pull", "Download a model", "Let a worker's server download a model."),
    "POST /v1/models/load": _job(
        "load", "Load a model", "Let a worker's server load a model into memory, to stay there."
    ),
    "POST /v1/models/unload": _job("unload", "Unload a model", "Let a worker's server free the memory of a model."),
}
