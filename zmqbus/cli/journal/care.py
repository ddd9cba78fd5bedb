"""`zmqbus journal verify` and `repair`: is a journal sound, what is lost if not, and how to go on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zmqbus.cli import shell
from zmqbus.cli.journal.shared import directory, helpful, lost_ranges, lost_text
from zmqbus.cli.messages.forms import human_bytes
from zmqbus.cli.shell import remark
from zmqbus.cli.shell.output import Meter, plural
from zmqbus.cli.shell.stopping import Stopped
from zmqbus.net.clock import time_ns

if TYPE_CHECKING:
    from zmqbus.journal.inspect import Finding


def meaning(finding: Finding, holder: int | None) -> str:
    """What a finding means to whoever has to decide what to do. `holder`: who uses the journal, or None."""
    if finding.kind == "torn":
        if holder is not None:
            return "it is being written at this moment"
        return "a crash cut it off, and nobody was promised it; the next start puts it into quarantine"
    if finding.lost:
        return lost_text(lost_ranges([finding]))
    if os.path.basename(finding.path) == "meta":
        return "no message is lost: the segments know, too, which journal this is"
    if "/cursors/" in finding.path:
        return "no message is lost, but some durable subscribers will be given messages again"
    return "no message is lost by this"


def _row(finding: Finding, holder: int | None) -> dict[str, Any]:
    row = {
        "kind": finding.kind,
        "path": finding.path,
        "byte": finding.position,
        "offset": finding.offset,
        "lost": finding.lost,
        "text": finding.text,
    }
    return row | ({"meaning": meaning(finding, holder)} if finding.kind in ("damage", "torn") else {})


class Report:
    """Findings as they come: printed at once, or gathered for one JSON object in the end."""

    def __init__(self, label: str, holder: int | None, as_json: bool) -> None:
        self.meter = Meter(label)
        self.findings: list[Finding] = []
        self._holder = holder
        self._json = as_json

    def add(self, findings: Iterable[Finding]) -> None:
        """Raises what the search for them raises; Stopped, if the command was asked to stop."""
        try:
            for finding in findings:
                self.findings.append(finding)
                self.meter.hide()
                if not self._json:
                    self._print(finding)
        finally:
            self.meter.hide()

    def has(self, kind: str) -> bool:
        """Whether there was such a finding."""
        return any(finding.kind == kind for finding in self.findings)

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Offsets, first and last."""
        return lost_ranges(self.findings)

    def end(self, facts: dict[str, Any], *texts: str) -> None:
        """The last words: as text, or all of it as JSON."""
        if self._json:
            lost = [{"first": first, "last": last, "count": last - first + 1} for first, last in self.lost]
            rows = [_row(finding, self._holder) for finding in self.findings]
            click.echo(msgspec.json.encode(facts | {"lost": lost, "findings": rows}))
        else:
            for text in texts:
                click.echo(text)

    def _print(self, finding: Finding) -> None:
        from zmqbus.cli.messages.render import escape

        if finding.kind in ("planned", "repaired"):
            click.echo(f"{'would be' if finding.kind == 'planned' else 'done'}: {escape(finding.path)}")
            click.echo(f"    {escape(finding.text)}")
            return
        at = "" if finding.offset is None else f", message offset {finding.offset}"
        label = "unfinished" if finding.kind == "torn" else finding.kind
        click.echo(f"{label}: {escape(finding.path)} at byte {finding.position}{at}")
        click.echo(f"    {escape(finding.text)}")
        click.echo(f"    {escape(meaning(finding, self._holder))}")


def _holder(path: str) -> int | None:
    from zmqbus.journal.storage import Disk, in_use, os_errors

    with os_errors("open", path):
        return in_use(Disk(), path)


# --- verify ------------------------------------------------------------------------------------


@click.command()
@directory
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
def verify(directory: str, as_json: bool) -> int:
    """Check every byte of the journal DIR.

    It says what is damaged, where, and what that means, and changes nothing. Exits with 0 if the journal is sound,
    and with 65 if it is damaged. An unfinished write at its end is no damage: nobody was promised it.
    """
    from zmqbus.journal.inspect import info
    from zmqbus.journal.repair import verify as check

    with helpful(directory):
        holder = _holder(directory)
        report = Report("checking", holder, as_json)
        try:
            report.add(check(directory, progress=report.meter.update))
        except Stopped:
            remark("interrupted: not all of it was checked")
            raise
    facts: dict[str, Any] = {"path": directory, "sound": not report.has("damage")}
    if report.has("damage"):
        places = sum(finding.kind == "damage" for finding in report.findings)
        report.end(
            facts,
            f"damaged in {plural(places, 'place')}; {lost_text(report.lost)}",
            f"go back to a sound copy if there is one; if not, see what could be saved: "
            f"zmqbus journal repair {shlex.quote(directory)}",
        )
        return shell.DATA_ERROR
    seen = info(directory)
    what = f"{plural(len(seen.segments), 'segment')}, {human_bytes(seen.bytes_used)}"
    report.end(facts, f"sound: {what}, {plural(seen.next_offset - seen.first_offset, 'message')}")
    return shell.OK


# --- repair ------------------------------------------------------------------------------------


@click.command()
@directory
@click.option("--yes", is_flag=True, help="Do it. Without this, only say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
def repair(directory: str, yes: bool, as_json: bool) -> int:
    """Make the damaged journal DIR usable again.

    Every good message is kept, and the others are declared lost.

    Without --yes it only says what it would do, and exits with 65 if there is anything to do. With --yes it does it;
    no forwarder may use the journal then. Nothing is destroyed: each file is copied to the journal's quarantine
    before it is written anew. Consumers are told which offsets are no more.
    """
    from zmqbus.journal.repair import repair as mend
    from zmqbus.journal.repair import verify as check

    quoted = shlex.quote(directory)
    with helpful(directory):
        holder = _holder(directory)
        report = Report("repairing" if yes else "checking", holder, as_json)
        try:
            report.add(mend(directory, now_ns=time_ns(), progress=report.meter.update, pretend=not yes))
        except Stopped:
            if yes:
                remark("interrupted: what is done is done well, and the rest is as it was; run it again to finish")
            raise
    facts: dict[str, Any] = {"path": directory, "sound": not report.has("damage"), "repaired": report.has("repaired")}
    if not report.has("damage"):
        report.end(facts, "sound: there is nothing to repair")
        return shell.OK
    if not yes:
        report.end(facts, lost_text(report.lost))
        first = "" if holder is None else f"first stop process {holder or '?'}, which uses the journal; then "
        remark(f"nothing was changed; to do it: {first}zmqbus journal repair --yes {quoted}")
        return shell.DATA_ERROR
    again = Meter("checking")
    left: list[Finding] | None = None
    try:
        left = [finding for finding in check(directory, progress=again.update) if finding.kind == "damage"]
    finally:
        again.hide()
        report.end(facts | {"sound": left == []}, f"repaired; {lost_text(report.lost)}")
    if left:
        remark(f"it is still damaged, in {plural(len(left), 'place')}: run zmqbus journal verify {quoted}")
        return shell.DATA_ERROR
    return shell.OK
