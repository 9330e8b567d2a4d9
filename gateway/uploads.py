"""Uploaded files in the place of a form's files, for jobs that are submitted as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from gateway.endpoint import Endpoint
from schemas.errors import InvalidRequest
from schemas.jobs import Upload

MAX_FILES = 16
"""Of one field: as many as OpenAI takes pictures for an edit."""


class OwnFile(Protocol):
    """What is needed of an uploaded file."""

    @property
    def filename(self) -> str:
        """As it was uploaded."""

    @property
    def content_type(self) -> str:
        """The same."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def blob(self) -> str:
        """Where its bytes are."""


Open = Callable[[str, str], Awaitable[OwnFile]]
"""(owner, file id) to the file. Raises NotFound."""


class FileUploads:
    """See the module's docstring."""

    def __init__(self, open_file: Open) -> None:
        self._open = open_file

    async def take(
        self, owner: str, endpoint: Endpoint, body: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Upload, ...]]:
        """The body without its files, and the files. Raises InvalidRequest, NotFound."""
        fields = {name: value for name, value in body.items() if name not in endpoint.files}
        uploads: list[Upload] = []
        for name in endpoint.files:
            given = body.get(name)
            ids = given if isinstance(given, list) else [given] if given is not None else []
            if len(ids) > MAX_FILES:
                raise InvalidRequest(f"'{name}' names more than {MAX_FILES} files", param=name)
            for file_id in ids:
                if not isinstance(file_id, str):
                    raise InvalidRequest(f"'{name}' must be the id of an uploaded file (POST /v1/files)", param=name)
                file = await self._open(owner, file_id)
                uploads.append(_upload(name, file))
        if not any(upload.field == endpoint.files[0] for upload in uploads):
            raise InvalidRequest(
                f"'{endpoint.files[0]}' is missing: the id of an uploaded file (POST /v1/files)",
                param=endpoint.files[0],
            )
        return fields, tuple(uploads)


def _upload(field: str, file: OwnFile) -> Upload:
    kind = file.content_type
    return Upload(field=field, filename=file.filename, content_type=kind, size=file.size, blob=file.blob, kept=True)
