"""Progress of long work on the error stream: bar, count, time left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
_shown: ContextVar[bool] = ContextVar("keelweight_progress_shown", default=False)


@contextmanager
def shown(show: bool = True) -> Iterator[None]:
    """Show progress bars inside this block. The command line does; the library alone is silent."""
    token = _shown.set(show)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items` while a bar named `what` counts them up to `total`, with the time that is left."""
    if not _shown.get():
        yield from items
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)
