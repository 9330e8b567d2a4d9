"""The descriptions of the routes for models, voices and model management."""

from __future__ import annotations

from gateway.openapi.operation import Operation, json_response
from gateway.openapi.operations.common import MODEL, PREFERENCES, STREAM, inference_responses
from gateway.openapi.shapes.media import ModelJobDone
from gateway.openapi.shapes.operators import (
    CatalogItem,
    CatalogList,
    ModelList,
    ModelObject,
    SpeechModelList,
    VoiceList,
)
from schemas.model_jobs import ModelJobRequest


def _job(verb: str, summary: str, description: str) -> Operation:
    return Operation(
        id=f"{verb}Model",
        tag="operation",
        scope="admin:operate",
        runs_inference=True,
        summary=summary,
        description=description + " With `stream: true`, return the progress as events.",
        body=ModelJobRequest,
        examples={"A model": {"model": "llama3.2:1b"}},
        responses=inference_responses(ModelJobDone, "The operation is complete.", STREAM),
        errors={404: "No live worker with this name manages models (`worker_not_found`), or the model does not exist."},
        parameters=PREFERENCES,
    )


OPERATIONS = {
    "GET /v1/models": Operation(
        id="listModels",
        tag="models",
        summary="List models",
        description="Return the live models and the aliases that resolve to them. With the header `anthropic-version`: those that chat, as a page in "
        "Anthropic's form.",
        responses=json_response(ModelList, "The models."),
    ),
    "GET /v1/models/{model_id}": Operation(
        id="getModel",
        tag="models",
        summary="Get a model",
        description="Return one model or alias, even if no worker currently serves it.",
        responses=json_response(ModelObject, "The model."),
        errors={404: "The model does not exist (`model_not_found`)."},
        parameters={
            "model_id": {"description": "The model's id. `:` and `/` may be percent-encoded.", "example": MODEL}
        },
    ),
    "GET /v1/catalog": Operation(
        id="listCatalog",
        tag="models",
        summary="List models with their parameters",
        description="Return the models and aliases that the key may use, with their state, their workers, and their parameters as JSON Schema.",
        responses=json_response(CatalogList, "The models."),
        parameters={"capability": {"description": "Only models with this capability.", "example": "chat"}},
    ),
    "GET /v1/catalog/{model_id}": Operation(
        id="getCatalogEntry",
        tag="models",
        summary="Get a model with its parameters",
        description="Return one model or alias, its parameters as JSON Schema, and for each of its endpoints a request that works.",
        responses=json_response(CatalogItem, "The model."),
        errors={404: "The model does not exist (`model_not_found`)."},
        parameters={
            "model_id": {"description": "The model's id. `:` and `/` may be percent-encoded.", "example": MODEL}
        },
    ),
    "GET /v1/audio/voices": Operation(
        id="listVoices",
        tag="models",
        summary="List voices",
        description="Return the voices of all live speech models, in the form that Open WebUI reads.",
        responses=json_response(VoiceList, "The voices."),
    ),
    "GET /v1/audio/models": Operation(
        id="listSpeechModels",
        tag="models",
        summary="List speech models",
        description="Return the live speech models and the aliases that resolve to them.",
        responses=json_response(SpeechModelList, "The models."),
    ),
    "POST /v1/models/pull": _job("pull", "Download a model", "Download a model to a worker's inference server."),
    "POST /v1/models/load": _job(
        "load", "Load a model", "Load a model into the memory of a worker's inference server and keep it there."
    ),
    "POST /v1/models/unload": _job(
        "unload", "Unload a model", "Free the memory that a model uses on a worker's inference server."
    ),
}
