"""The descriptions of the routes for files and batches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from gateway.openapi.operation import BINARY, JSON, Operation, SuccessResponse, json_response
from gateway.openapi.operations.common import PAGE, identifier
from gateway.openapi.shapes.files import BatchList, BatchObject, FileDeleted, FileList, FileObject
from schemas.batches import BatchRequest
from schemas.endpoints import ENDPOINTS
from schemas.files import UPLOAD_PURPOSES

BATCH_ENDPOINTS = tuple(sorted(["/v1/messages", "/v1/responses", *(spec.path for spec in ENDPOINTS if spec.batchable)]))
WINDOW = r"^([1-9][0-9]{0,3}m|([1-9][0-9]?|1[0-5][0-9]|16[0-7])h|[1-6]d)$"
"""The windows that the gateway accepts with its default configuration."""
FIELDS: dict[str, Any] = {
    "endpoint": (Literal[BATCH_ENDPOINTS], Field(description="The endpoint that the requests are for.")),
    "input_file_id": (
        str,
        Field(
            min_length=1,
            max_length=100,
            description="The id of a file with the purpose `batch` that holds one request per line.",
        ),
    ),
    "completion_window": (
        str,
        Field(
            pattern=WINDOW,
            description="`24h`, or another number of `m`, `h` or `d`. A batch that takes longer expires.",
        ),
    ),
}
DOCUMENTED_REQUEST = create_model("BatchRequest", __base__=BatchRequest, __doc__="A batch to run.", **FIELDS)
"""The request body, including the rules that the route checks in addition to the field types."""

FILE = {"file_id": identifier("file-", "The id of a file.", "^file-[0-9a-f]{32}$")}
NO_FILE = {404: "The file does not exist, has expired, or belongs to another owner."}
BATCH = {"batch_id": identifier("batch_", "The id of a batch.", "^batch_[0-9a-f]{32}$")}
NO_BATCH = {404: "The batch does not exist, or belongs to another owner."}
UPLOAD: JSON = {
    "type": "object",
    "required": ["purpose"],
    "properties": {
        "purpose": {
            "type": "string",
            "enum": list(UPLOAD_PURPOSES),
            "description": "The purpose of the file: `batch` for the input of a batch.",
        },
        "expires_after[anchor]": {
            "type": "string",
            "enum": ["created_at"],
            "description": "Required with `expires_after[seconds]`.",
        },
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": 3600,
            "maximum": 2_592_000,
            "description": "How long the file is stored, in seconds from its upload.",
        },
    },
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
}

OPERATIONS = {
    "POST /v1/files": Operation(
        id="uploadFile",
        tag="files",
        scope="jobs",
        summary="Upload a file",
        description="Store a file: the input of a batch, or a file that a job's body refers to by id. Nexus stores it for 30 days, unless the operator "
        "or `expires_after` sets another time.",
        body=UPLOAD,
        files={"file": "The file."},
        responses=json_response(FileObject, "The stored file."),
    ),
    "GET /v1/files": Operation(
        id="listFiles",
        tag="files",
        scope="jobs",
        summary="List files",
        description="Return the caller's files.",
        responses=json_response(FileList, "A page of files."),
        parameters=PAGE
        | {
            "order": {"description": "`desc`: newest first. `asc`: oldest first."},
            "purpose": {"description": "Return only files with this purpose."},
        },
    ),
    "GET /v1/files/{file_id}": Operation(
        id="getFile",
        tag="files",
        scope="jobs",
        summary="Get a file",
        description="Return a file's name, size, purpose and times.",
        responses=json_response(FileObject, "The file's record."),
        errors=NO_FILE,
        parameters=FILE,
    ),
    "GET /v1/files/{file_id}/content": Operation(
        id="getFileContent",
        tag="files",
        scope="jobs",
        summary="Download a file",
        description="Return a file's bytes exactly as uploaded. Batch output files hold JSON lines.",
        responses={
            200: SuccessResponse(
                "The file's bytes.", {"application/octet-stream": BINARY}, ("Content-Disposition", "Content-Length")
            )
        },
        errors=NO_FILE,
        parameters=FILE,
    ),
    "DELETE /v1/files/{file_id}": Operation(
        id="deleteFile",
        tag="files",
        scope="jobs",
        summary="Delete a file",
        description="Delete a file. A running batch that uses the file continues.",
        responses=json_response(FileDeleted, "The file is deleted."),
        errors=NO_FILE,
        parameters=FILE,
    ),
    "POST /v1/batches": Operation(
        id="createBatch",
        tag="batches",
        scope="jobs",
        summary="Create a batch",
        description="Run the requests of a file, one per line, as jobs in the lane `flex`. The key also needs the scope `inference`.",
        body=DOCUMENTED_REQUEST,
        examples={
            "Chats": {
                "input_file_id": "file-" + "0" * 31 + "1",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            }
        },
        responses=json_response(BatchObject, "The batch. Nexus validates its input file first."),
        errors=NO_FILE
        | {
            413: "The body is too large, or the team's files and batches take as many bytes as they may "
            "(`storage_limit_reached`): delete files first."
        },
    ),
    "GET /v1/batches": Operation(
        id="listBatches",
        tag="batches",
        scope="jobs",
        summary="List batches",
        description="Return the caller's batches, newest first.",
        responses=json_response(BatchList, "A page of batches."),
        parameters=PAGE,
    ),
    "GET /v1/batches/{batch_id}": Operation(
        id="getBatch",
        tag="batches",
        scope="jobs",
        summary="Get a batch",
        description="Return a batch's status, its request counts and the ids of its output files.",
        responses=json_response(BatchObject, "The batch."),
        errors=NO_BATCH,
        parameters=BATCH,
    ),
    "POST /v1/batches/{batch_id}/cancel": Operation(
        id="cancelBatch",
        tag="batches",
        scope="jobs",
        summary="Cancel a batch",
        description="End a batch early. The output file holds the responses that are complete by then.",
        responses=json_response(BatchObject, "The batch's current state."),
        errors=NO_BATCH | {400: "The batch has already ended (`batch_ended`)."},
        parameters=BATCH,
    ),
}
