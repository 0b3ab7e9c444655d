"""Structured logs on standard error: for people (console) or for machines (one JSON object a line)."""

import logging
import sys
from typing import Any

import structlog

from services.common.settings import LogFormat


def configure(log_format: LogFormat, *, level: int = logging.INFO) -> None:
    """Set up structlog and hand the server's own log records to it. Called by the command line, once a process."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        renderer: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Plain tracebacks: the decorated ones take seconds to draw, in which no robot is answered.
        renderer = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # the server's own chatter about connections is not an event of ours


def ensure_configured() -> None:
    """Console logs, unless the program that embeds the service has set up structlog already."""
    if not structlog.is_configured():
        configure("console")


def get_logger(name: str) -> Any:
    """A logger that takes an event and key=value context."""
    return structlog.get_logger(component=name)
