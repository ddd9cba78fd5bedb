"""`journal verify` and `repair` tell the truth and destroy nothing; and the mistakes of a tired operator."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import PATIENCE, finish, run
from tests.cli.journal.journals import (
    DAMAGES,
    MESSAGES,
    START_NS,
    add,
    damage_cursors,
    damage_header,
    damage_last,
    damage_meta,
    damage_records,
    flip,
    lose_the_end,
    newer,
    newer_segment,
    open_journal,
    payload,
    readable,
    segments,
    snapshot,
    tear,
)
from zmqbus.cli.shell import output
from zmqbus.cli.shell.output import Meter

Start = Callable[..., subprocess.Popen[str]]


def named(value: Any) -> str | None:
    return value.__name__ if callable(value) else None


def told(args: Any) -> str | None:
    return " ".join(args)[:40] if isinstance(args, list) else None


def verified(path: Path) -> dict[str, Any]:
    """What verify tells programs."""
    code, out, err = run("journal", "verify", str(path), "--json")
    result: dict[str, Any] = json.loads(out)
    assert (code, err) == (0 if result["sound"] else 65, "")
    return result


def lost_of(result: dict[str, Any]) -> set[int]:
    for span in result["lost"]:
        assert span["count"] == span["last"] - span["first"] + 1
    return {n for span in result["lost"] for n in range(span["first"], span["last"] + 1)}


# --- verify ------------------------------------------------------------------------------------


def test_a_sound_journal(path: Path) -> None:
    before = snapshot(path)
    code, out, err = run("journal", "verify", str(path))
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"sound: {len(segments(path))} segments, \S+ KiB, {MESSAGES} messages\n", out)
    assert verified(path) == {"path": str(path), "sound": True, "lost": [], "findings": []}
    for yes in ((), ("--yes",)):
        assert run("journal", "repair", str(path), *yes) == (0, "sound: there is nothing to repair\n", "")
    assert snapshot(path) == before


def test_damage_is_named_with_its_place_and_meaning(path: Path) -> None:
    damage_records(path)
    before = snapshot(path)
    code, out, err = run("journal", "verify", str(path))
    assert (code, err) == (65, "")
    lines = out.splitlines()
    first, third = segments(path)[0], segments(path)[2]
    for block, file, at in ((lines[0:3], first, 1000), (lines[3:6], third, 300), (lines[6:9], third, 1500)):
        found = re.fullmatch(rf"damage: {file} at byte (\d+), message offset (\d+)", block[0])
        assert found is not None, block
        assert int(found[1]) <= at < int(found[1]) + 300
        assert re.fullmatch(r"    \w[\w ]+", block[1])
        offset = int(found[2])
        assert block[2] == f"    2 messages are lost: offsets {offset} to {offset + 1}"
    assert lines[9].startswith("damaged in 3 places; 6 messages are lost: offsets ")
    assert lines[10].endswith(f": zmqbus journal repair {path}")
    result = verified(path)
    assert [(one["kind"], one["path"], one["lost"]) for one in result["findings"]] == [
        ("damage", str(first), 2), ("damage", str(third), 2), ("damage", str(third), 2),
    ]  # fmt: skip
    assert len(lost_of(result)) == 6
    assert snapshot(path) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_meta, "no message is lost: the segments know, too, which journal this is"),
        (damage_cursors, "some durable subscribers will be given messages again"),
        (lose_the_end, "messages are lost: offsets "),
        (damage_header, "messages are lost: offsets "),
    ],
    ids=named,
)
def test_what_damage_means(path: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(path)
    code, out, _ = run("journal", "verify", str(path))
    assert code == 65
    assert words in out


def test_how_much_a_lost_header_costs_is_not_known(path: Path) -> None:
    flip(segments(path)[-1], 13)
    code, out, _ = run("journal", "verify", str(path))
    assert code == 65
    assert "how many messages it held is not known, at most so many" in out


def test_an_unfinished_write_is_no_damage(path: Path) -> None:
    tear(path)
    code, out, _ = run("journal", "verify", str(path))
    assert code == 0
    assert out.startswith(f"unfinished: {segments(path)[-1]} at byte ")
    assert "a crash cut it off, and nobody was promised it; the next start puts it into quarantine" in out
    assert out.splitlines()[-1].startswith("sound: ")
    result = verified(path)
    assert [one["kind"] for one in result["findings"]] == ["torn"]
    assert lost_of(result) == set()
    assert run("journal", "repair", str(path))[0] == 0


def test_what_is_being_written_is_said_to_be(path: Path, tmp_path: Path) -> None:
    tear(path)
    torn = segments(path)[-1].read_bytes()
    journal = open_journal(path)
    try:
        segments(path)[-1].write_bytes(torn)
        code, out, _ = run("journal", "verify", str(path))
        assert code == 0
        assert "it is being written at this moment" in out
        assert re.search(r"^its end +being written$", run("journal", "info", str(path))[1], re.MULTILINE)
    finally:
        journal.close(START_NS)


# --- repair ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES, ids=named)
def test_repair_says_what_it_would_do_then_does_it(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    damaged = snapshot(path)
    found = verified(path)

    code, out, err = run("journal", "repair", str(path))
    assert code == 65
    assert snapshot(path) == damaged
    assert err == f"zmqbus: nothing was changed; to do it: zmqbus journal repair --yes {path}\n"
    would = re.findall(r"^would be: (.*)$", out, re.MULTILINE)
    assert would
    plan = json.loads(run("journal", "repair", str(path), "--json")[1])
    assert (plan["repaired"], plan["sound"], plan["lost"]) == (False, False, found["lost"])
    assert snapshot(path) == damaged

    code, out, err = run("journal", "repair", "--yes", str(path))
    assert (code, err) == (0, "")
    assert re.findall(r"^done: (.*)$", out, re.MULTILINE) == would
    lost = lost_of(found)
    last = out.splitlines()[-1]
    total = f"{len(lost):,} message" if lost else "no message"
    assert last.startswith(f"repaired; {total}")
    for kept in re.findall(r"as it was: (\S+)$", out, re.MULTILINE):
        name, _, _ = os.path.basename(kept).rpartition(".")
        original = os.path.join(os.path.dirname(os.path.dirname(kept)), name)
        assert Path(kept).read_bytes() == damaged[original]
    after = snapshot(path)
    for file, data in damaged.items():  # whatever was replaced is somewhere
        if not file.endswith((".idx", "LOCK")):
            assert data in (after.get(file), *(kept for name, kept in after.items() if "/quarantine/" in name)), file
    assert verified(path)["sound"]
    good = readable(path)
    assert good.isdisjoint(lost)
    known = 100 if damage is lose_the_end else MESSAGES  # that there was more than a cursor has passed, nothing says
    assert good | lost == set(range(known))


def test_repair_for_programs(path: Path) -> None:
    damage_last(path)
    lost = lost_of(verified(path))
    code, out, err = run("journal", "repair", "--yes", "--json", str(path))
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["sound"], result["repaired"]) == (True, True)
    assert lost_of(result) == lost
    assert [one["kind"] for one in result["findings"]] == ["damage", "repaired"]


def test_a_journal_in_use_is_left_alone(path: Path) -> None:
    journal = open_journal(path)
    try:
        flip(segments(path)[0], 1000)
        before = snapshot(path)
        code, out, err = run("journal", "repair", str(path))
        assert code == 65
        assert f"first stop process {os.getpid()}, which uses the journal" in err
        code, out, err = run("journal", "repair", "--yes", str(path))
        assert (code, out) == (75, "")
        assert (
            err == f"zmqbus: journal {path} is in use by process {os.getpid()}: stop it, or choose another directory\n"
        )
        assert snapshot(path) == before
        assert run("journal", "verify", str(path))[0] == 65
    finally:
        journal.close(START_NS)


def test_repair_on_a_full_disk_harms_nothing(start: Start, path: Path) -> None:
    """A limit of the file size stands for a full disk."""
    damage_records(path)
    before = snapshot(path)
    command = ["sh", "-c", 'ulimit -f 1; exec "$0" -m zmqbus "$@"', sys.executable]
    code, _, err = finish(start("journal", "repair", "--yes", str(path), command=command))
    assert code == 74
    assert err == f"zmqbus: journal {path} is full: cannot repair it: File too large; free some space\n"
    assert {file: data for file, data in snapshot(path).items() if file in before} == before | {
        f"{path}/LOCK": (path / "LOCK").read_bytes()
    }
    assert "0 files" in run("journal", "info", str(path))[1]
    assert run("journal", "repair", "--yes", str(path))[0] == 0
    assert verified(path)["sound"]


# --- a bar for long work -----------------------------------------------------------------------


def test_long_work_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "METER_AFTER", 0.0)
    monkeypatch.setattr(output, "METER_EVERY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        meter = Meter("checking")
        meter.update(1, 2)
        meter.hide()
        meter.update(2, 2)
        meter.hide()
    written = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody has it open any more
        while data := os.read(ours, 65536):
            written += data
    os.close(ours)
    shown = written.decode()
    assert shown.index("checking") < shown.index("50%") < shown.index("100%")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_there_is_no_bar_elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "METER_AFTER", 0.0)
    assert run("journal", "verify", str(path))[2] == ""


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, str]] = [
    (["info"], 2, "Missing argument 'DIR'"),
    (["info", ""], 2, "it is empty"),
    (["info", "DIR", "extra"], 2, "extra argument"),
    (["DIR", "info"], 2, "zmqbus journal info DIR"),
    (["DIR"], 2, "zmqbus journal info DIR"),
    (["nope", "DIR"], 2, "No such command 'nope'"),
    (["info", "nowhere"], 66, "cannot open it: No such file or directory"),
    (["dump", "nowhere"], 66, "No such file"),
    (["verify", "nowhere"], 66, "No such file"),
    (["repair", "nowhere"], 66, "No such file"),
    (["repair", "--yes", "nowhere"], 66, "No such file"),
    (["export", "nowhere", "-o", "out"], 66, "No such file"),
    (["info", "."], 66, "there is no journal in it; there is one in ./DIR"),
    (["verify", "."], 66, "there is one in ./DIR"),
    (["repair", "--yes", "."], 66, "there is one in ./DIR"),
    (["info", "empty"], 66, "there is no journal in it"),
    (["info", "DIR/meta"], 66, "Not a directory; there is one in DIR"),
    (["verify", "DIR/meta"], 66, "there is one in DIR"),
    (["info", "DIR/cursors"], 66, "a part of the journal above it"),
    (["verify", "DIR/cursors"], 66, "a part of the journal above it"),
    (["repair", "--yes", "DIR/cursors"], 66, "a part of the journal above it"),
    (["dump", "DIR", "--json", "--hex"], 2, "choose one"),
    (["dump", "DIR", "logs..x"], 2, "empty"),
    (["dump", "DIR", "web*"], 2, "whole token"),
    (["dump", "DIR", "--from", "soon"], 2, "--from"),
    (["dump", "DIR", "-n", "0"], 2, "-n"),
    (["dump", "DIR", "--since", "1h"], 2, "for that long ago write a minus before it"),
    (["dump", "DIR", "--since", "-1 fortnight"], 2, "is not a time"),
    (["dump", "DIR", "--since", "yesterday"], 2, "is not a time"),
    (["dump", "DIR", "--since", "25:00"], 2, "is not a time"),
    (["dump", "DIR", "--since", "@1e99"], 2, "is not a time"),
    (["dump", "DIR", "--since", "2026-07-31", "--until", "2026-07-30"], 2, "--since is not before --until"),
    (["export", "DIR"], 2, "--output"),
    (["export", "DIR", "-o", "out", "--format", "csv"], 2, "csv"),
    (["repair", "-y", "DIR"], 2, "-y"),
    (["verify", "DIR", "--repair"], 2, "--repair"),
    (["--bus", "x", "info", "DIR"], 2, "belongs before the command"),
]


@pytest.mark.parametrize(
    ("args", "code", "words"), MISTAKES, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None
)
def test_a_mistake_gets_one_clear_line_and_does_nothing(
    args: list[str], code: int, words: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.rename(path.parent / "DIR")
    (path.parent / "empty").mkdir()
    monkeypatch.chdir(path.parent)
    before = snapshot(path.parent)
    got, out, err = run("journal", *args)
    assert (got, out) == (code, "")
    assert err.startswith("zmqbus: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("change", [newer, newer_segment], ids=named)
def test_a_journal_of_a_newer_zmqbus_is_not_touched(path: Path, change: Callable[[Path], None], tmp_path: Path) -> None:
    change(path)
    before = snapshot(path)
    for args in (
        ["info"],
        ["dump"],
        ["verify"],
        ["repair"],
        ["repair", "--yes"],
        ["export", "-o", str(tmp_path / "x")],
    ):
        code, out, err = run("journal", *args, str(path))
        assert (code, out) == (66, "")
        assert re.fullmatch(
            r"zmqbus: journal \S+ has format version 99, this zmqbus reads up to 1: upgrade zmqbus\n", err
        )
    after = snapshot(path)
    assert {file: data for file, data in after.items() if not file.endswith("LOCK")} == {
        file: data for file, data in before.items() if not file.endswith("LOCK")
    }
    assert not (tmp_path / "x").exists()


def test_a_directory_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for args in (["info"], ["dump"], ["verify"], ["repair"], ["repair", "--yes"]):
        code, _, err = run("journal", *args, str(tmp_path))
        assert code == 66
        assert err == f"zmqbus: journal {tmp_path}: there is no journal in it\n"
    assert snapshot(tmp_path) == {str(tmp_path / "notes.txt"): b"mine"}


def test_permission_denied(path: Path) -> None:
    run("journal", "info", str(path))  # whatever is imported by then need not be readable for others
    run("journal", "verify", str(path))
    run("journal", "repair", str(path))
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    else:
        path.chmod(0)
    try:
        results = [run("journal", *args, str(path)) for args in (["info"], ["dump"], ["verify"], ["repair", "--yes"])]
    finally:
        if root:
            os.seteuid(0)
        else:
            path.chmod(0o700)
    for code, out, err in results:
        assert (code, out) == (66, "")
        assert "Permission denied" in err
        assert len(err.splitlines()) == 1


def test_without_a_command_there_is_help() -> None:
    code, out, err = run("journal")
    assert (code, out) == (2, "")
    assert [line.split()[0] for line in err.split("Commands:\n")[1].splitlines()] == [
        "info", "dump", "verify", "repair", "export",
    ]  # fmt: skip


def test_completion_goes_down_to_options_and_directories(start: Start) -> None:
    def complete(*words: str) -> list[str]:
        line = {"COMP_WORDS": " ".join(("zmqbus", *words)), "COMP_CWORD": str(len(words))}
        return finish(start(env=os.environ | {"_ZMQBUS_COMPLETE": "bash_complete"} | line))[1].split()

    assert complete("journal", "ver") == ["plain,verify"]
    assert complete("journal", "verify", "/va") == ["dir,/va"]
    assert "plain,--since" in complete("journal", "dump", "--")


def test_neither_zmq_nor_the_network_is_imported(path: Path) -> None:
    add(path, b"one", payload(1, ["more"], START_NS))
    program = (
        "import sys\nfrom zmqbus.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print({'zmq', 'zeroconf', 'ifaddr', 'asyncio'} & set(sys.modules))"
    )
    for args in (["info"], ["dump"], ["verify"], ["repair", "--yes"], ["export", "-o", "-"]):
        done = subprocess.run(
            [sys.executable, "-c", program, "journal", *args, str(path)],
            capture_output=True, text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "set()", args
