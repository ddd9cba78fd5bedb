"""In which order a program really asks the kernel for things: a run under strace, and the rules of a durable log.

    calls = trace([sys.executable, "program.py", …], folder / "trace")       # skips the test where strace is missing
    order = verify(calls, journal=str(directory), told=acknowledgements, finished=True)
    assert order.violations == []

A program that must be talked to meanwhile is started with `strace(output)` before its command, and its trace read with
`parse_trace` when it has ended.

Whatever the program is made of, threads and processes included, it is judged by its system calls alone. A message, or
a cursor, is known by its **mark**, `<<…>>` in the bytes of its record. `told(call)` names the marks that a call
tells the outside world are on disk: lines written to a file here, frames sent on sockets by a forwarder.

The rules, for all files below `journal`:

1. *told after durable*: a call that tells of a mark begins after an fdatasync (or fsync) has returned 0, which had
   begun after the write of the mark had returned; and after a directory fsync that covers the file's name likewise.
2. *name before records*: a mark is written to a file under its final name only once that name is on disk.
3. *contents before name*: a file is renamed to its final name only after an fsync that covers all that was written.
4. *one removal at a time*: between two unlinks of segments in one directory lies an fsync of that directory, so
   that no crash leaves a hole in the log.
5. *every name in the end*: each creation, rename, removal and new directory is followed by an fsync of its directory;
   asked of a run that ended by itself (`finished`).

Exempt from 3 to 5 are files that may be lost: indexes, and the lock. Names that end in `.tmp` are not final.

**What the order of a trace means.** strace sees a call begin before the kernel acts on it, and end before the program
learns the result. So if one call rests on the result of another, also of another thread, the first ends in the
trace before the second begins. A call that only happens to come later proves nothing, and is not asked to.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from posixpath import basename, dirname, join, normpath
from typing import NamedTuple

import pytest

MARK = re.compile(rb"<<[^<>]+>>")
WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2", "sendto", "sendmsg")
SYNCS = ("fsync", "fdatasync")
NAMES = ("openat", "open", "creat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat")
DISPOSABLE = (".idx", ".idx.tmp", "LOCK")
TRACE_TIMEOUT_S = 60


class Call(NamedTuple):
    """One system call. `begun` and `ended` are lines of the trace, which is the only clock here."""

    begun: int
    ended: int
    name: str
    result: int | None
    path: str
    """The file: that of its descriptor, or the one named by the call."""
    target: str
    """The second path of a rename; the empty string otherwise."""
    data: bytes
    """What was written, up to what the kernel took."""
    flags: str
    """The arguments as strace writes them, without strings."""


# --- running and reading ---------------------------------------------------------------------------


def strace(output: Path) -> list[str]:
    """What to put before a command so that its trace is written to a file."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    calls = ",".join((*WRITES, *SYNCS, *NAMES))
    options = ["-f", "-ttt", "-y", "-v", "-xx", "-s", str(1 << 20), "-e", f"trace={calls}", "-e", "signal=none"]
    command = [program, *options, "-o", str(output)]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=TRACE_TIMEOUT_S)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    return command


def trace(command: list[str], output: Path, environment: Mapping[str, str] | None = None) -> list[Call]:
    """Run a command to its end under strace. It must succeed."""
    done = subprocess.run(
        [*strace(output), *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=TRACE_TIMEOUT_S,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return parse_trace(output.read_text())


_LINE = re.compile(r"(\d+)\s+[\d.]+ (.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"\)\s+= (-?\d+|\?)(?:<[^>]*>)?(?: [A-Z(].*)?$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>")


def parse_trace(text: str) -> list[Call]:
    """The calls of a trace, in the order in which they ended. Those that never did are left out."""
    calls: list[Call] = []
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines()):
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"line {number + 1} of the trace makes no sense: {line[:200]}")
        pid, rest = found.groups()
        first = number
        if resumed := _RESUMED.match(rest):
            first, before = begun.pop(pid)
            rest = before + resumed[1]
        elif rest.endswith(_UNFINISHED):
            begun[pid] = number, rest.removesuffix(_UNFINISHED)
            continue
        if result := _RESULT.search(rest):
            name, _, arguments = rest[: result.start()].partition("(")
            calls.append(_call(first, number, name, arguments, None if result[1] == "?" else int(result[1])))
    return calls


def _call(begun: int, ended: int, name: str, arguments: str, result: int | None) -> Call:
    if "..." in (found[1] for found in _STRING.findall(arguments)):
        raise ValueError(f"strace has cut a string of {name} short")
    strings = [_bytes(found[0]) for found in _STRING.findall(arguments)]
    folders = [_bytes(found).decode() for found in _DESCRIPTOR.findall(arguments)]
    flags = _DESCRIPTOR.sub("", _STRING.sub("", arguments))
    if name in WRITES:
        data = b"".join(strings)[: max(result or 0, 0)]
        return Call(begun, ended, name, result, folders[0] if folders else "", "", data, flags)
    if name in SYNCS:
        return Call(begun, ended, name, result, folders[0], "", b"", flags)
    folders += [""] * (2 - len(folders))
    paths = [normpath(join(folder, path.decode())) for folder, path in zip(folders, strings, strict=False)]
    return Call(begun, ended, name, result, paths[0], paths[1] if len(paths) > 1 else "", b"", flags)


def _bytes(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


# --- judging ---------------------------------------------------------------------------------------


class Order(NamedTuple):
    """The verdict, and how much was seen."""

    violations: list[str]
    told: int
    """Marks that the outside world was told of."""
    writes: int
    syncs: int
    names: int
    """Files and directories that were made, renamed or removed."""


class _File:
    """A file, whatever it is called."""

    def __init__(self) -> None:
        self.named: list[tuple[int, str]] = []  # when it got which name
        self.written: list[int] = []  # when writes ended
        self.syncs: list[tuple[int, int]] = []


class _Syncs:
    """The fsyncs of each directory, in order."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[int, int]]] = {}

    def add(self, directory: str, call: Call) -> None:
        self._of.setdefault(directory, []).append((call.begun, call.ended))

    def after(self, directory: str, line: int) -> int | None:
        """When the first fsync returned that covers what had ended at `line`."""
        return first_after(self._of.get(directory, []), line)


def first_after(syncs: list[tuple[int, int]], line: int) -> int | None:
    return min((ended for _, ended in syncs[bisect_right(syncs, (line, 1 << 62)) :]), default=None)


def verify(
    calls: list[Call], *, journal: str, told: Callable[[Call], Iterable[bytes]], finished: bool = False
) -> Order:
    """Hold a trace against the rules."""
    ours = journal + "/"
    violations: list[str] = []
    files: dict[str, _File] = {}
    marks: dict[bytes, list[tuple[_File, Call]]] = {}
    changes: list[tuple[Call, str, str]] = []  # (call, directory to be synced, what was done)
    renames: list[tuple[Call, _File]] = []
    told_marks: list[tuple[Call, bytes]] = []
    directories = _Syncs()
    counts = {"writes": 0, "syncs": 0}

    for call in calls:
        told_marks += [(call, mark) for mark in told(call)]
        if call.result is None or call.result < 0 or not (call.path + "/").startswith(ours):
            if call.name in SYNCS and call.result == 0:
                directories.add(call.path, call)  # the parent of the journal's own directory
            continue
        if call.name in WRITES:
            counts["writes"] += 1
            file = files.setdefault(call.path, _File())
            file.written.append(call.ended)
            for mark in set(MARK.findall(call.data)):
                marks.setdefault(mark, []).append((file, call))
        elif call.name in SYNCS:
            counts["syncs"] += 1
            directories.add(call.path, call)
            if call.path in files:
                files[call.path].syncs.append((call.begun, call.ended))
        elif call.name.startswith(("open", "creat")):
            if ("O_CREAT" in call.flags or call.name == "creat") and call.path not in files:
                files[call.path] = _File()
                files[call.path].named.append((call.ended, call.path))
                changes.append((call, dirname(call.path), f"{basename(call.path)} was made"))
        elif call.name.startswith("rename"):
            file = files[call.target] = files.pop(call.path, _File())
            file.named.append((call.ended, call.target))
            renames.append((call, file))
            changes.append((call, dirname(call.target), f"{basename(call.path)} was renamed"))
        elif call.name.startswith("unlink"):
            files.pop(call.path, None)
            changes.append((call, dirname(call.path), f"{basename(call.path)} was removed"))
        elif call.name.startswith("mkdir"):
            changes.append((call, dirname(call.path), f"the directory {basename(call.path)} was made"))

    def name_durable(file: _File, before: int) -> bool:
        named = [item for item in file.named if item[0] < before]
        if not named:
            return True  # it was there when the trace began
        ended, path = named[-1]
        while len(path) >= len(journal):
            synced = directories.after(dirname(path), ended)
            if synced is None or synced > before:
                return False
            path = dirname(path)
            made = [call.ended for call, _, _ in changes if call.name.startswith("mkdir") and call.path == path]
            if not made:
                return True
            ended = made[-1]
        return True

    for call, mark in told_marks:
        if not any(
            (synced := first_after(file.syncs, write.ended)) is not None
            and synced < call.begun
            and name_durable(file, call.begun)
            for file, write in marks.get(mark, [])
        ):
            violations.append(f"told after durable: line {call.begun + 1} tells of {mark.decode()}, not yet on disk")
    for places in marks.values():
        for file, write in places:
            if not write.path.endswith(".tmp") and not name_durable(file, write.begun):
                violations.append(f"name before records: line {write.begun + 1} writes to {basename(write.path)}")
    for call, file in renames:
        written = [line for line in file.written if line < call.begun]
        if written and not call.target.endswith(DISPOSABLE):
            synced = first_after(file.syncs, written[-1])
            if synced is None or synced > call.begun:
                violations.append(f"contents before name: line {call.begun + 1} renames to {basename(call.target)}")
    pending: dict[str, Call] = {}
    for call, directory, what in changes:
        lasting = not call.path.endswith(DISPOSABLE) and not call.target.endswith(DISPOSABLE)
        synced = directories.after(directory, call.ended)
        if finished and lasting and synced is None:
            violations.append(f"every name in the end: line {call.begun + 1}: {what}, the directory not synced")
        if call.name.startswith("unlink") and call.path.endswith(".zbj"):
            if (before := pending.get(directory)) is not None:
                synced = directories.after(directory, before.ended)
                if synced is None or synced > call.begun:
                    violations.append(f"one removal at a time: lines {before.begun + 1} and {call.begun + 1}")
            pending[directory] = call
    return Order(violations, len(told_marks), counts["writes"], counts["syncs"], len(changes))
