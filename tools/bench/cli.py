"""The command line: `python tools/bench COMMAND`. Progress goes to stderr, results to stdout.

Exit status: 0 when everything could be measured, whatever the verdicts (with --check: and every budget is met),
1 when a run failed or, with --check, a budget is missed.
"""

from __future__ import annotations

import functools
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import durable as durability
from bench import idle as idling
from bench import join as joining
from bench import many as crowd
from bench import match as matching
from bench import pubsub as throughput
from bench import queue as queueing
from bench import readback as reading
from bench import recovery as recovering
from bench import report
from bench import request as asking
from bench import roundtrip as latency
from bench.crew import WorkerFailed
from bench.results import Table
from zmqbus import BusKey

RUNS = 5
RUNS_MANY = 3  # each takes a while, and there is nothing to compare with
FACES = ("sync", "async")
FANS = (1, 4)

Progress = Callable[[str], None]


def common(command: Callable[..., list[Table]]) -> Callable[..., None]:
    """The options that every command has, and what is done with the tables that it returns."""

    @click.option("--runs", type=click.IntRange(1, 100), help=f"Runs of each contender [default: {RUNS}; quick: 1].")
    @click.option("--quick", is_flag=True, help="Few messages and runs: to see that it works, not to measure.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every single run.")
    @click.option("--markdown", is_flag=True, help="Print Markdown tables, for docs/benchmarks.md.")
    @click.option("--check", is_flag=True, help="Exit with status 1 when a budget is missed.")
    @functools.wraps(command)
    def wrapped(runs: int | None, quick: bool, as_json: bool, markdown: bool, check: bool, **options: Any) -> None:
        noise = report.Noise()
        try:
            with _status(sys.stderr.isatty()) as progress:
                tables = command(runs=runs or (1 if quick else RUNS), quick=quick, progress=progress, **options)
        except WorkerFailed as error:
            raise click.ClickException(str(error)) from None
        facts = noise.facts()
        if as_json:
            settings = {"runs": runs, "quick": quick, **options}
            click.echo(report.as_json(tables, settings, facts))
        elif markdown:
            click.echo(report.as_markdown(tables, facts))
        else:
            console = Console()
            report.show(console if console.is_terminal else Console(width=200), tables, facts)
        if check and any(line.passed is False for table in tables for line in table.lines):
            raise SystemExit(1)

    return wrapped


@contextmanager
def _status(on_terminal: bool) -> Iterator[Progress]:
    if not on_terminal:
        yield lambda _: None
        return
    with Console(stderr=True).status("starting") as status:
        yield status.update


@contextmanager
def _key_file() -> Iterator[str]:
    """A temporary bus key."""
    with tempfile.TemporaryDirectory(prefix="zmqbus-bench-") as directory:
        path = Path(directory, "key")
        BusKey.generate().save(path)
        yield str(path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure zmqbus against raw pyzmq, in the same run, on this machine's loopback.

    Each figure is the median of several runs, which alternate with runs of the raw thing; the ratio is that of
    neighbouring runs, so that what slows the machine for a while slows both. docs/benchmarks.md explains each line.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended on this, too


@main.command()
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(throughput.SIZES)), help="Only these sizes.")
@click.option(
    "--fan", "fans", multiple=True, type=click.IntRange(1, 16), help="Only so many subscribers [default: 1, 4]."
)
@click.option("--face", "faces", multiple=True, type=click.Choice(FACES), help="Only Node, or only AsyncNode.")
@click.option("--curve", is_flag=True, help="Measure with a bus key (CURVE) too.")
@common
def pubsub(
    sizes: tuple[str, ...],
    fans: tuple[int, ...],
    faces: tuple[str, ...],
    curve: bool,
    runs: int,
    quick: bool,
    progress: Progress,
) -> list[Table]:
    """Throughput, 1→1 and 1→4, 16 B to 1 MiB; loss counted."""
    chosen = [throughput.SIZES[size] for size in sizes or throughput.SIZES]
    with _key_file() as key:
        return throughput.measure(chosen, fans or FANS, faces or FACES, runs, quick, key if curve else None, progress)


@main.command()
@click.option("--face", "faces", multiple=True, type=click.Choice(FACES), help="Only Node, or only AsyncNode.")
@common
def roundtrip(faces: tuple[str, ...], runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Latency of publish, receive, publish back, at a low rate."""
    return latency.measure(faces or FACES, runs, quick, progress)


@main.command()
@common
def request(runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Latency of request and reply."""
    return asking.measure(runs, quick, progress)


@main.command()
@click.option("--namespaces/--no-namespaces", default=True, help="Between two network namespaces too (root, Linux).")
@common
def join(namespaces: bool, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Time from a newcomer's start until both sides exchange messages."""
    with _key_file() as key:
        return joining.measure(namespaces, key, runs, progress)


@main.command()
@common
def idle(runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Memory, CPU, import and opening of a node that does nothing."""
    return idling.measure(runs, quick, progress)


@main.command()
@click.option("--nodes", type=click.IntRange(2, 200), help=f"How many [default: {crowd.NODES}].")
@common
def many(nodes: int | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Many nodes on one machine discover each other."""
    return crowd.measure(nodes or (crowd.NODES_QUICK if quick else crowd.NODES), min(runs, RUNS_MANY), progress)


@main.command()
@common
def match(runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Topic matching, compiled and by a trie."""
    return matching.measure(runs, quick, progress)


@main.command()
@click.option("--directory", type=click.Path(exists=True, file_okay=False), help="On the disk to measure [/tmp].")
@common
def durable(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Durable publishing: throughput and latency, against the live rate and the disk."""
    return durability.measure(directory, runs, quick, progress)


@main.command()
@click.option("--directory", type=click.Path(exists=True, file_okay=False), help="On the disk to measure [/tmp].")
@common
def readback(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Reading a forwarder's log, against the live rate."""
    return reading.measure(directory, runs, quick, progress)


@main.command()
@click.option("--directory", type=click.Path(exists=True, file_okay=False), help="On the disk to measure [/tmp].")
@common
def recovery(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """A forwarder's memory with a large journal, and its restart."""
    return recovering.measure(directory, min(runs, RUNS_MANY), quick, progress)


@main.command()
@click.option("--directory", type=click.Path(exists=True, file_okay=False), help="On the disk to measure [/tmp].")
@common
def queue(directory: str | None, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """Work queues: jobs acknowledged one by one, uneven and dying workers, a backlog."""
    return queueing.measure(directory, runs, quick, progress)


@main.command(name="all")
@click.option(
    "--namespaces/--no-namespaces", default=True, help="Join between two network namespaces too (root, Linux)."
)
@common
def everything(namespaces: bool, runs: int, quick: bool, progress: Progress) -> list[Table]:
    """All of the above, one after the other (about a quarter of an hour)."""
    with _key_file() as key:
        return [
            *throughput.measure(list(throughput.SIZES.values()), FANS, FACES, runs, quick, key, progress),
            *latency.measure(FACES, runs, quick, progress),
            *asking.measure(runs, quick, progress),
            *joining.measure(namespaces, key, runs, progress),
            *idling.measure(runs, quick, progress),
            *crowd.measure(crowd.NODES_QUICK if quick else crowd.NODES, min(runs, RUNS_MANY), progress),
            *matching.measure(runs, quick, progress),
            *durability.measure(None, runs, quick, progress),
            *reading.measure(None, runs, quick, progress),
            *recovering.measure(None, min(runs, RUNS_MANY), quick, progress),
            *queueing.measure(None, runs, quick, progress),
        ]
