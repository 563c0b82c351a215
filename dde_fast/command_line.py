"""A command line into a dataclass, by tyro, with complaints of one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro


def parse_command_line(kind: type, args: Sequence[str] | None, **options: Any) -> Any:
    """`tyro.cli` whose complaint is one line.

    Raises:
        ValueError: what tyro says of an unknown flag or a value of the wrong kind.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=args, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro explains in a box of several lines; its first row says what is wrong
        rows = [row.strip(" │") for row in box.getvalue().splitlines()[1:]]
        message = " ".join(rows[: next(i for i, row in enumerate(rows) if set(row) <= set("─╰╯"))])
        raise ValueError(f"command line: {message}; --help lists every flag") from None
