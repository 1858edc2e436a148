"""The error envelope of the Messages API. Raised anywhere, turned into an answer by `app`."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error answer.

    Args:
        status: HTTP status.
        kind: `error.type` of the API.
        message: for a refused request it begins with the path of the field.
        headers: further answer headers.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = headers or {}

    def envelope(self, request_id: str) -> dict[str, Any]:
        """The body."""
        error = {"type": self.kind, "message": str(self)}
        return {"type": "error", "error": error, "request_id": request_id}


def invalid(path: str, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, "invalid_request_error", f"{path}: {message}" if path else message)
