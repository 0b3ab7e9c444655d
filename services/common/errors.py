"""Errors that a caller of a service may see: a code that programs act on, and a message that people act on."""

import math
from dataclasses import dataclass
from typing import Any

from recap_client.images import ImageError
from recap_client.wire import WireError
from recap_model.observation import ObservationError
from recap_model.tokenizer import PromptTooLong

CODES = (
    "bad_observation",
    "bad_message",
    "too_large",
    "deadline",
    "superseded",
    "internal",
    "shutting_down",
    "unavailable",
    "unauthorized",
    "forbidden",
    "rate_limited",
    "spec_mismatch",
)

_HTTP_STATUS = {
    "bad_observation": 422,
    "bad_message": 400,
    "too_large": 413,
    "deadline": 504,
    "superseded": 409,
    "internal": 500,
    "shutting_down": 503,
    "unavailable": 503,
    "unauthorized": 401,
    "forbidden": 403,
    "rate_limited": 429,
    "spec_mismatch": 409,
}


@dataclass(frozen=True)
class Fault:
    """What is told to the caller. code: one of `CODES`. field, expected and got are set where one part is to blame,
    retry_after_s where the same request will do after so many seconds."""

    code: str
    message: str
    field: str | None = None
    expected: str | None = None
    got: str | None = None
    retry_after_s: float | None = None

    def to_message(self) -> dict[str, Any]:
        """Plain map; absent parts are left out."""
        parts = {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "expected": self.expected,
            "got": self.got,
            "retry_after_s": self.retry_after_s,
        }
        return {key: value for key, value in parts.items() if value is not None}

    @property
    def http_status(self) -> int:
        return _HTTP_STATUS[self.code]

    @property
    def http_headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds where there is a time to wait."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class ServiceError(Exception):
    """An error with a `Fault` for the caller."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = Fault(code, message, field, expected, got, retry_after_s)


def bad_field(code: str, field: str, expected: str, got: str) -> ServiceError:
    """A part of a message does not fit: names it, says what was expected and what came."""
    return ServiceError(code, f"{field}: expected {expected}, got {got}", field=field, expected=expected, got=got)


def fault_of(error: BaseException) -> Fault:
    """The fault to report for any exception. What is not a caller's mistake becomes `internal`, without a traceback."""
    if isinstance(error, ServiceError):
        return error.fault
    if isinstance(error, ObservationError):
        return Fault("bad_observation", str(error), error.field, error.expected, error.got)
    if isinstance(error, PromptTooLong):
        return Fault("bad_observation", str(error), "prompt")
    if isinstance(error, ImageError):
        return Fault("bad_observation", str(error), "images")
    if isinstance(error, WireError):
        return Fault("bad_message", str(error), error.field or None, error.expected, error.got)
    if isinstance(error, RecursionError):
        return Fault("bad_message", "message: expected a few levels of maps and lists, got too many")
    return Fault("internal", f"{type(error).__name__}: {error}; the service log has the details")
