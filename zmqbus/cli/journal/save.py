"""`zmqbus journal export`: messages of a journal into a file that programs can read."""

from __future__ import annotations

import contextlib
import os
import stat
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.journal.read import Reading, Selection, selecting
from zmqbus.cli.journal.shared import directory, helpful
from zmqbus.cli.messages.forms import Fields, to_json
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.output import PATIENCE, Meter, Output, on_terminal, plural
from zmqbus.errors import JournalCorrupt

if TYPE_CHECKING:
    from zmqbus.journal.records import Batch
    from zmqbus.protocol.message import Message

FILE_MODE = 0o600  # as the journal, of which this is a copy
BUFFER_BYTES = 1 << 20


class CannotCreate(click.ClickException):
    """The file cannot be created, or is there already."""

    exit_code = shell.CANNOT_CREATE


class NewFile:
    """A file that appears under its name when it is whole, and on disk; until then it is FILE.partial.

    It replaces nothing unless `force`, and then nothing but a regular file. After damage in the journal what was
    written stays as FILE.partial; after anything else that went wrong, nothing stays.
    """

    def __init__(self, path: str, force: bool) -> None:
        self.path = path
        self.partial = f"{path}.partial"
        self._force = force
        for name in (path, self.partial):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                kind = os.lstat(name).st_mode
                if not stat.S_ISREG(kind):
                    what = "a directory" if stat.S_ISDIR(kind) else "no regular file"
                    raise CannotCreate(f"{name} is {what}: name another file, or - for standard output")
                if not force:
                    left = "; it is of an export that did not finish, or is under way" if name == self.partial else ""
                    raise CannotCreate(f"{name} is there already{left}: name another file, or replace it with --force")
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_TRUNC if force else os.O_EXCL)
        try:
            self._file: BinaryIO = open(os.open(self.partial, flags, FILE_MODE), "wb", BUFFER_BYTES)  # noqa: SIM115
        except OSError as error:
            raise CannotCreate(f"{path} cannot be created: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        try:
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if error is None or isinstance(error, JournalCorrupt):
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if error is None:
                self._appear()
        except OSError as failure:
            self._remove()
            raise OSError(failure.errno, failure.strerror, self.path) from None
        if error is not None and not isinstance(error, JournalCorrupt):
            self._remove()

    def _appear(self) -> None:
        if self._force:
            os.replace(self.partial, self.path)
            return
        try:
            os.link(self.partial, self.path)  # unlike a rename, never over another file
        except FileExistsError:
            raise CannotCreate(f"{self.path} has appeared meanwhile: the export is in {self.partial}") from None
        except OSError:  # a file system without links
            if os.path.lexists(self.path):
                raise CannotCreate(f"{self.path} has appeared meanwhile: the export is in {self.partial}") from None
            os.rename(self.partial, self.path)
            return
        os.unlink(self.partial)

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.partial)


def _as_json(message: Message, batch: Batch) -> bytes:
    return to_json(Fields(message, now=0.0)).encode() + b"\n"


def _as_msgpack(message: Message, batch: Batch) -> bytes:
    row: dict[str, Any] = {
        "offset": message.offset,
        "topic": message.topic,
        "seq": message.seq,
        "origin": f"{message.origin:016x}",
        "time_ns": batch.time_ns,
        "headers": message.headers or {},
        "value": message.value,  # as it was stored, byte by byte
    }
    return msgspec.msgpack.encode(row)


@click.command()
@directory
@selecting
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(),
    required=True,
    metavar="FILE",
    help="Where to; - is standard output. FILE appears when it is whole.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "msgpack"]),
    default="json",
    show_default=True,
    help="JSON lines, or msgpack maps one after the other.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say how many messages there were; only what went wrong.")
def export(directory: str, selection: Selection, file: str, form: str, force: bool, quiet: bool) -> int:
    """Write messages of the journal DIR to a file.

    All of them, or those whose topics fit a PATTERN, in a form for programs.

    The file is readable by you alone, as the journal is. It is FILE.partial until it is whole. If the journal turns
    out to be damaged, everything before the damage stays there; if anything else goes wrong, nothing does.

    \b
    Examples:
      zmqbus journal export /var/lib/zmqbus -o everything.ndjson
      zmqbus journal export /var/lib/zmqbus 'orders.>' --since -1d --format msgpack -o orders.msgpack
      zmqbus journal export /var/lib/zmqbus -o - | gzip > everything.ndjson.gz
    """
    encode = _as_json if form == "json" else _as_msgpack
    if file == "-":
        if form == "msgpack" and on_terminal():
            raise click.UsageError("msgpack is not for a terminal: name a FILE, or send the output through a pipe")
    elif not os.path.basename(file):
        raise click.UsageError(f"-o {file!r} names no file")
    elif f"{os.path.realpath(os.path.dirname(file) or '.')}/".startswith(f"{os.path.realpath(directory)}/"):
        raise click.UsageError(f"{file} is inside the journal, where nothing else belongs: name a file elsewhere")
    with helpful(directory):
        reading = Reading(directory, selection, raw=form == "msgpack")
    if file == "-":
        written = _to_output(reading, encode)
    else:
        written = _to_file(reading, encode, file, force)
    if not quiet:
        where = "" if file == "-" else f" to {file}"
        remark(f"{plural(written, 'message')} exported{where}{reading.nothing()}")
    return shell.DATA_ERROR if reading.undecodable else shell.OK


def _to_output(reading: Reading, encode: Any) -> int:
    meter = Meter("exporting", shown=not on_terminal())
    output = Output()

    def progress(done: int, total: int) -> None:
        meter.update(done, total)
        output.flush()

    try:
        for message, batch in reading.messages(progress):
            output.put_bytes(encode(message, batch))
        output.flush()
    finally:
        meter.hide()
        output.flush(PATIENCE)
        if output.shown < reading.read:
            remark(f"{plural(reading.read, 'message')} read, {output.shown:,} exported")
    return output.shown


def _to_file(reading: Reading, encode: Any, file: str, force: bool) -> int:
    meter = Meter("exporting")
    with NewFile(file, force) as new:
        try:
            for message, batch in reading.messages(meter.update):
                new.write(encode(message, batch))
        except JournalCorrupt:
            meter.hide()
            remark(f"{plural(reading.read, 'message')} before the damage: {new.partial}")
            raise
        finally:
            meter.hide()
    return reading.read
