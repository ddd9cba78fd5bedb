"""What the journal commands share: their argument, ranges of offsets, and help with a directory that is no journal."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from zmqbus.cli.shell.output import plural
from zmqbus.errors import JournalUnavailable

if TYPE_CHECKING:
    from zmqbus.journal.inspect import Finding

RANGES_SHOWN = 20


class Directory(click.ParamType):  # type: ignore[type-arg]
    """A journal's directory. What is wrong with it, the journal says better than click."""

    name = "directory"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Without slashes at its end."""
        if not value:
            self.fail("it is empty: name the directory of a journal", param, ctx)
        return str(value).rstrip("/") or "/"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell knows directories."""
        return [CompletionItem(incomplete, type="dir")]


directory = click.argument("directory", metavar="DIR", type=Directory())


@contextlib.contextmanager
def helpful(path: str) -> Iterator[None]:
    """Where there is no journal, say where there is one: next to it, as with the directory above or a file within."""
    try:
        yield
    except JournalUnavailable as error:
        found = None
        if os.path.isdir(path):
            with contextlib.suppress(OSError):
                below = (os.path.join(path, name) for name in sorted(os.listdir(path)))
                found = next((one for one in below if _is_journal(one)), None)
        elif _is_journal(os.path.dirname(os.path.abspath(path))):
            found = os.path.dirname(path) or "."
        if found is None or error.directory != path:
            raise
        raise JournalUnavailable(path, f"{error.reason}; there is one in {shlex.quote(found)}") from None


def _is_journal(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "meta")) and any(
        name.endswith(".zbj") or name == "LOCK" for name in os.listdir(path)
    )


# --- what is lost ------------------------------------------------------------------------------


def lost_ranges(findings: Iterable[Finding]) -> list[tuple[int, int]]:
    """The offsets (first, last) that findings of damage declare lost, joined where they touch."""
    ranges: list[tuple[int, int]] = []
    spans = [(one.offset, one.offset + one.lost - 1) for one in findings if one.lost and one.offset is not None]
    for first, last in sorted(spans):
        if ranges and first <= ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], max(last, ranges[-1][1])
        else:
            ranges.append((first, last))
    return ranges


def lost_text(ranges: list[tuple[int, int]]) -> str:
    """`no message is lost`, or `3 messages are lost: offsets 7, 20 to 21`."""
    total = sum(last - first + 1 for first, last in ranges)
    if not total:
        return "no message is lost"
    shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ranges[:RANGES_SHOWN])
    if len(ranges) > RANGES_SHOWN:
        shown += f", and {plural(len(ranges) - RANGES_SHOWN, 'more range')} (--json has all)"
    are = "message is" if total == 1 else "messages are"
    return f"{total:,} {are} lost: {'offset' if total == 1 else 'offsets'} {shown}"
