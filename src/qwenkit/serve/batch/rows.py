"""Types of the batch API: files, batches and lines as the store knows them, and as OpenAI's API shows them.

In: rows of the database. Out: frozen dataclasses whose fields are the columns, and `public()`, what a client sees.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class BatchLimits:
    """How much the batch API takes: bytes and lines of one input file, bytes on disk in all, and what one key may hold."""

    max_file_bytes: int = 200 * 2**20
    max_lines: int = 50_000
    disk_quota: int = 20 * 2**30
    key_quota: int = 5 * 2**30
    key_files: int = 10_000
    key_batches: int = 100  # unfinished at a time


@dataclass(frozen=True)
class FileRow:
    seq: int
    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None

    def public(self) -> dict[str, Any]:
        """OpenAI's `file` object."""
        shown = {
            name: getattr(self, name) for name in ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
        }
        return {"object": "file", **shown, "status": "processed", "status_details": None}


@dataclass(frozen=True)
class BatchRow:
    seq: int
    id: str
    owner: str
    owner_name: str  # for logs and metrics; nothing is decided by it
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str | None
    output_seconds: int | None  # life of the files it writes; None: as long as the store keeps files
    status: str
    outcome: str | None  # what it becomes once its files are written
    errors: str | None
    model: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    cancelling_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelled_at: int | None
    total: int
    completed: int
    failed: int
    result_bytes: int
    input_tokens: int
    output_tokens: int

    def public(self) -> dict[str, Any]:
        """OpenAI's `batch` object."""
        hidden = {
            "seq",
            "owner",
            "owner_name",
            "output_seconds",
            "outcome",
            "total",
            "completed",
            "failed",
            "result_bytes",
        }
        hidden |= {"input_tokens", "output_tokens"}
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in hidden}
        errors = {"object": "list", "data": json.loads(self.errors)} if self.errors else None
        return shown | {
            "object": "batch",
            "metadata": json.loads(self.metadata) if self.metadata else None,
            "errors": errors,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": self.input_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": self.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.input_tokens + self.output_tokens,
            },
        }


@dataclass(frozen=True)
class Line:
    """One request of a batch: its number from 1, and where its JSON stands in the input file (bytes)."""

    line: int
    custom_id: str
    start: int
    length: int


@dataclass(frozen=True)
class NewFile:
    """A file that is whole on disk and gets its row with the transition it belongs to."""

    id: str
    filename: str
    bytes: int


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
