"""How results are shown: tables for people, Markdown to paste, JSON for programs; and what machine they are from."""

from __future__ import annotations

import json
import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter, strftime
from typing import Any

import zmq
from rich.console import Console
from rich.table import Table as Grid

from bench.results import Budget, Line, Table

TIMES, TO = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


class Noise:
    """Watches, from its making on, how much CPU others take: what makes figures of this run worth less."""

    def __init__(self) -> None:
        self._start = self._look()
        self.load_before = os.getloadavg()[0]

    def facts(self) -> dict[str, Any]:
        """Load averages, and the share of all CPUs that others used meanwhile. Workers must have been reaped."""
        wall, busy, own = (now - then for now, then in zip(self._look(), self._start, strict=True))
        others = max(0.0, busy - own) / max(wall, 0.1) / (os.cpu_count() or 1) * 100
        return {
            "load_before": self.load_before,
            "load_after": os.getloadavg()[0],
            "cpu_of_others_percent": round(others, 1) if busy else None,
            "seconds": round(wall, 1),
        }

    def _look(self) -> tuple[float, float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        own = sum(usage.ru_utime + usage.ru_stime for usage in used)
        try:
            with open("/proc/stat") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except OSError:
            return perf_counter(), 0.0, own
        return perf_counter(), (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


def machine() -> dict[str, Any]:
    """Where this was measured."""
    try:
        release = version("zmqbus-toolkit")
    except PackageNotFoundError:
        release = "unknown"
    return {
        "date": strftime("%Y-%m-%d %H:%M"),
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "zmqbus": release,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def baseline_spread(tables: list[Table]) -> float | None:
    """How far the raw runs of one line lie apart, in percent of their median; the median of that over all lines."""
    apart = [
        (max(line.raw) - min(line.raw)) / median(line.raw) * 100
        for table in tables
        for line in table.lines
        if len(line.raw) > 1 and median(line.raw) > 0
    ]
    return round(median(apart), 1) if apart else None


def as_json(tables: list[Table], settings: dict[str, Any], noise: dict[str, Any]) -> str:
    """One object."""
    noise = {**noise, "raw_spread_percent": baseline_spread(tables)}
    results = [{"title": t.title, "notes": t.notes, "lines": [line.as_json() for line in t.lines]} for t in tables]
    return json.dumps({"machine": machine(), "noise": noise, "settings": settings, "results": results}, indent=2)


def show(console: Console, tables: list[Table], noise: dict[str, Any]) -> None:
    """Tables on a terminal."""
    for table in tables:
        grid = Grid(title=table.title, title_justify="left", caption="; ".join(table.notes), caption_justify="left")
        for number, name in enumerate(columns(table)):
            grid.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for line in table.lines:
            style = {True: "green", False: "bold red", None: ""}[line.passed]
            *cells, verdict = row(line, table)
            grid.add_row(*cells, f"[{style}]{verdict}[/]" if style else verdict)
        console.print(grid)
        console.print()
    console.print(conditions(tables, noise), style="dim", highlight=False)


def as_markdown(tables: list[Table], noise: dict[str, Any]) -> str:
    """Tables to paste into a page."""
    out = [conditions(tables, noise), ""]
    for table in tables:
        names = columns(table)
        out += [f"**{table.title}** ({'; '.join(table.notes)})", "", f"| {' | '.join(names)} |"]
        out += [f"| --- |{' ---: |' * (len(names) - 1)}"]
        out += [f"| {' | '.join(row(line, table))} |" for line in table.lines]
        out += [""]
    return "\n".join(out)


def conditions(tables: list[Table], noise: dict[str, Any]) -> str:
    """Machine and noise in a sentence."""
    facts, apart = machine(), baseline_spread(tables)
    parts = [
        str(facts["date"]),
        f"{facts['cpus']} {TIMES} {facts['cpu']}, {facts['kernel']}",
        f"Python {facts['python']}, pyzmq {facts['pyzmq']} (libzmq {facts['libzmq']}), zmqbus {facts['zmqbus']}",
        f"load {noise['load_before']:.1f} before and {noise['load_after']:.1f} after",
        f"other programs used {noise['cpu_of_others_percent']} % of all CPUs",
    ]
    if apart is not None:
        parts.append(f"raw runs lie {apart:.0f} % apart")
    return "; ".join(parts)


# --- cells ---------------------------------------------------------------------------------------


def columns(table: Table) -> list[str]:
    """The heads of a table's columns."""
    names = [""]
    if _has_raw(table):
        names += ["compared with", "raw", "zmqbus", "ratio"]
    else:
        names += ["zmqbus"]
    return [*names, *(["lost", "repaired"] if _counts_loss(table) else []), "budget", ""]


def row(line: Line, table: Table) -> list[str]:
    """A line's cells, of which the last is the verdict."""
    cells = [line.label]
    if _has_raw(table):
        cells += [
            line.raw_name,
            _spread(line.raw, line.unit),
            _spread(line.ours, line.unit),
            _spread(line.ratios, TIMES),
        ]
    else:
        cells += [_spread(line.ours, line.unit)]
    if _counts_loss(table):
        cells += ["" if line.lost is None else f"{line.lost:,}", "" if line.repaired is None else f"{line.repaired:,}"]
    return [*cells, _budget(line.budget, line.unit), {True: "✓", False: "✗", None: ""}[line.passed]]


def _has_raw(table: Table) -> bool:
    return any(line.raw for line in table.lines)


def _counts_loss(table: Table) -> bool:
    return any(line.lost is not None for line in table.lines)


def _spread(values: list[float], unit: str) -> str:
    if not values:
        return ""
    middle, *ends = (_number(value, unit) for value in (median(values), min(values), max(values)))
    middle += unit if unit in (TIMES, "/s") else f" {unit}"
    return middle if len(values) == 1 else f"{middle} ({TO.join(ends)})"


def _number(value: float, unit: str) -> str:
    if unit == "/s":
        for limit, divisor, suffix in ((1e6, 1e6, " M"), (1e4, 1e3, " k")):
            if value >= limit:
                return f"{value / divisor:.3g}{suffix}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _budget(budget: Budget | None, unit: str) -> str:
    if budget is None:
        return ""
    sign, limit = ("≥", budget.at_least) if budget.at_least is not None else ("≤", budget.at_most)
    return f"{sign} {limit:g}{TIMES if budget.of == 'ratio' else f' {unit}'}"
