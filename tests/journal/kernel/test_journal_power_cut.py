"""Power cuts of a real ext4: what was acknowledged before the cut is there after it, once, and in order.

How the power is cut, and why what is left is what a power cut can leave, is told in power_cut.py. The verdict is the
history checker's (tests/forwarder/history_checker.py), over what the writer had been promised at the moment of the cut
and what the recovered journal holds. A failure names the cut and keeps its image.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import journal_writer
import pytest
from history import Committed, Line, parse
from history_checker import Kind, check
from journal_writer import CONSUMER, CURSOR_FILE_BYTES, SEGMENT_BYTES, stored
from power_cut import Cut, RecordedDisk, Recording, mounted

from zmqbus.errors import JournalCorrupt
from zmqbus.journal import Journal, positions

CUTS = 240  # of each test run; some 50 ms each, half of that for ext4
CAMPAIGN_CUTS = 20_000
OPERATIONS = 2000  # writes and flushes of the disk, in half a second of work
PROGRAM = Path(journal_writer.__file__)


class Broken(AssertionError):
    """A cut after which something was missing."""


@pytest.fixture(autouse=True)
def _the_writers_cursor_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "CURSOR_FILE_BYTES", CURSOR_FILE_BYTES)


def record(folder: Path, seed: int, *options: str, operations: int = OPERATIONS) -> tuple[Recording, Path]:
    """Let the writer work on a recorded disk, and kill it."""
    history = folder / "history.jsonl"
    with RecordedDisk(folder) as disk:
        disk.watch(history)
        child = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(disk.path / "journal"), str(history), "--seed", str(seed), *options],
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[3])},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 60
            while len(disk) < operations and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            recording = disk.recording()
        finally:
            child.kill()
            _, complaint = child.communicate(timeout=30)
    assert len(recording) >= operations, f"the writer got no further than {len(recording)} operations: {complaint}"
    return recording, history


def judge(cut: Cut, folder: Path, history: Path, tally: Counter[str]) -> None:
    """Everything that must hold after one cut."""
    before = parse(cut.promised.get(history, b""), "writer")
    with mounted(cut.image, folder) as path:
        opened = path / "journal"
        tally["quarantined"] -= len(list(opened.glob("quarantine/*")))
        journal = None
        try:
            journal = Journal.open(str(opened), now_ns=1, segment_bytes=SEGMENT_BYTES)
            after = stored(journal)
            cursor = journal.cursors.all().get(CONSUMER)
            end = journal.durable_offset
        except JournalCorrupt as error:
            raise Broken(f"a power cut was taken for damage: {error}") from error
        finally:
            if journal is not None:
                journal.close(1)
        tally["quarantined"] += len(list(opened.glob("quarantine/*")))
        tally["segments"] = max(tally["segments"], len(list(opened.glob("*.zbj"))))
    lines = [*before, *(Line(event, "journal", event.offset) for event in after)]
    report = check(lines)
    if report.violations:
        raise Broken(str(report))
    if [event.offset for event in after] != list(range(end)):
        raise Broken(f"the offsets are not 0 to {end - 1}")
    confirmed = max((line.event.offset for line in before if isinstance(line.event, Committed)), default=0)
    if (cursor.offset if cursor else 0) < confirmed:
        raise Broken(f"the cursor was confirmed at {confirmed}, and is {cursor}")
    tally["acked"] += report.counts["acked"]
    tally["stored"] += len(after)
    tally["committed"] += confirmed > 0
    tally["with unflushed writes"] += cut.unflushed > 0


def run(folder: Path, seed: int, cuts: int, *options: str, operations: int = OPERATIONS) -> Counter[str]:
    recording, history = record(folder, seed, *options, operations=operations)
    tally: Counter[str] = Counter()
    for cut in recording.cuts(seed, cuts):
        try:
            judge(cut, folder, history, tally)
        except Exception as error:
            # The seed alone does not bring the same run of the writer about again, so the evidence is kept.
            (kept := folder / "broken.ext4").write_bytes(cut.image)
            kept.with_suffix(".jsonl").write_bytes(cut.promised.get(history, b""))
            error.add_note(f"{cut.label}; {cut.unflushed} writes were not flushed; see {kept} and its .jsonl")
            raise
        tally["cuts"] += 1
    return tally


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    seed = int(os.environ.get("ZMQBUS_SEED", "1"))
    tally = run(tmp_path, seed, CUTS)
    # That it was not too easy: most cuts hit writes on the way, some tore the log, and the log was a long one.
    assert tally["cuts"] == CUTS
    assert tally["with unflushed writes"] > CUTS // 3
    assert tally["segments"] >= 5
    assert tally["committed"] > CUTS // 2
    assert tally["quarantined"] >= 3, tally


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_power_cuts_campaign(tmp_path: Path) -> None:
    """ZMQBUS_SEEDS=first:last, by default 20 runs of 1,000 cuts each."""
    first, last = map(int, os.environ.get("ZMQBUS_SEEDS", "100:120").split(":"))
    for seed in range(first, last):
        (folder := tmp_path / str(seed)).mkdir()
        print(seed, dict(run(folder, seed, CAMPAIGN_CUTS // 20)))


def test_an_ack_without_sync_is_found_out(tmp_path: Path) -> None:
    """The test of the test: a writer that acknowledges before fdatasync is caught within a few cuts."""
    with pytest.raises(Broken, match=rf"{Kind.LOST}|taken for damage"):
        run(tmp_path, 1, 60, "--sabotage", "ack_before_sync", operations=500)
