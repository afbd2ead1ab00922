"""How an error reaches the user: as one sentence.

In: ValueError and OSError, the two kinds that say something the user can put right. Out: a sentence, and exit code 2.
"""

from __future__ import annotations

from typing import Any

import click


class UserError(click.ClickException):
    """Something the user can put right."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.format_message()}", err=True, file=file)


def sentence(error: Exception) -> str:
    """What the error says, without the numbers that an operating system's error begins with."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror[0].lower()}{error.strerror[1:]}{where}"
    return str(error)
