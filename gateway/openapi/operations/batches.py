"""Files and batches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from gateway.openapi.operation import BINARY, JSON, Answer, Operation, answer
from gateway.openapi.operations.common import PAGE, identifier
from gateway.openapi.shapes.files import Batch, BatchList, File, FileDeleted, FileList
from schemas.batches import BatchRequest
from schemas.files import UPLOAD_PURPOSES

ENDPOINTS = (
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/images/edits",
    "/v1/images/generations",
    "/v1/rerank",
    "/v1/responses",
)
WINDOW = r"^([1-9][0-9]{0,3}m|([1-9][0-9]?|1[0-5][0-9]|16[0-7])h|[1-6]d)$"
"""Up to the longest window that the gateway takes unless it is configured otherwise."""
FIELDS: dict[str, Any] = {
    "endpoint": (Literal[ENDPOINTS], Field(description="The endpoint that answers the requests.")),
    "input_file_id": (
        str,
        Field(min_length=1, max_length=100, description="A file with the purpose `batch`: a request on each line."),
    ),
    "completion_window": (
        str,
        Field(pattern=WINDOW, description="`24h`, or another number of m, h or d. A batch that takes longer expires."),
    ),
}
DOCUMENTED_REQUEST = create_model("BatchRequest", __base__=BatchRequest, __doc__="A batch to run.", **FIELDS)
"""With what its route checks beyond the fields' types."""

FILE = {"file_id": identifier("file-", "The id of a file.", "^file-[0-9a-f]{32}$")}
NO_FILE = {404: "There is no such file, it has expired, or it belongs to another owner."}
BATCH = {"batch_id": identifier("batch_", "The id of a batch.", "^batch_[0-9a-f]{32}$")}
NO_BATCH = {404: "There is no such batch, or it belongs to another owner."}
UPLOAD: JSON = {
    "type": "object",
    "required": ["purpose"],
    "properties": {
        "purpose": {
            "type": "string",
            "enum": list(UPLOAD_PURPOSES),
            "description": "What the file is for: `batch` for the input of a batch.",
        },
        "expires_after[anchor]": {
            "type": "string",
            "enum": ["created_at"],
            "description": "Goes with `expires_after[seconds]`.",
        },
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": 3600,
            "maximum": 2_592_000,
            "description": "How long the file is kept, from its upload on.",
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
        description="Store a file: the input of a batch, or what a job's body names by id. It is kept for 30 days unless the operator "
        "or `expires_after` says otherwise.",
        body=UPLOAD,
        files={"file": "The file."},
        answers=answer(File, "The stored file."),
    ),
    "GET /v1/files": Operation(
        id="listFiles",
        tag="files",
        scope="jobs",
        summary="List files",
        description="Return the caller's files.",
        answers=answer(FileList, "A page of files."),
        parameters=PAGE
        | {
            "order": {"description": "`desc`: the newest first."},
            "purpose": {"description": "Return files of this purpose alone."},
        },
    ),
    "GET /v1/files/{file_id}": Operation(
        id="getFile",
        tag="files",
        scope="jobs",
        summary="Get a file's record",
        description="Return a file's name, size, purpose and times.",
        answers=answer(File, "The file's record."),
        errors=NO_FILE,
        parameters=FILE,
    ),
    "GET /v1/files/{file_id}/content": Operation(
        id="getFileContent",
        tag="files",
        scope="jobs",
        summary="Download a file",
        description="Return a file's bytes as they were uploaded. Outputs of batches are JSON lines.",
        answers={
            200: Answer(
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
        description="Delete a file. A batch that runs on it goes on.",
        answers=answer(FileDeleted, "It is deleted."),
        errors=NO_FILE,
        parameters=FILE,
    ),
    "POST /v1/batches": Operation(
        id="createBatch",
        tag="batches",
        scope="jobs",
        summary="Create a batch",
        description="Run the requests of a file, one on each line, each as a job in the lane `flex`. The key needs the scope `inference` too.",
        body=DOCUMENTED_REQUEST,
        examples={
            "Chats": {
                "input_file_id": "file-" + "0" * 31 + "1",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            }
        },
        answers=answer(Batch, "The batch, which is validated first."),
        errors=NO_FILE,
    ),
    "GET /v1/batches": Operation(
        id="listBatches",
        tag="batches",
        scope="jobs",
        summary="List batches",
        description="Return the caller's batches, the newest first.",
        answers=answer(BatchList, "A page of batches."),
        parameters=PAGE,
    ),
    "GET /v1/batches/{batch_id}": Operation(
        id="getBatch",
        tag="batches",
        scope="jobs",
        summary="Get a batch",
        description="Return a batch as it stands: how many of its requests have ended, and the ids of its output files.",
        answers=answer(Batch, "The batch."),
        errors=NO_BATCH,
        parameters=BATCH,
    ),
    "POST /v1/batches/{batch_id}/cancel": Operation(
        id="cancelBatch",
        tag="batches",
        scope="jobs",
        summary="Cancel a batch",
        description="End a batch early. What has been answered by then is in its output file.",
        answers=answer(Batch, "The batch as it stands now."),
        errors=NO_BATCH | {400: "The batch has ended (`batch_ended`)."},
        parameters=BATCH,
    ),
}
