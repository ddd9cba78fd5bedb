"""Topic matching: does a topic fit any of a subscription's patterns? In this process; no sockets.

Raw is what one writes first: split both by dots, compare token by token, pattern after pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from time import perf_counter

from bench.results import Line, Table
from zmqbus.protocol.topics import Matcher, PatternSet

PATTERNS = (1, 10, 100, 1000)
TOPICS = [f"logs.web{host}.{service}" for host in range(40) for service in ("nginx", "app", "cron")]
CALLS = 20_000
CALLS_QUICK = 500

Progress = Callable[[str], None]


def measure(runs: int, quick: bool, progress: Progress) -> list[Table]:
    """One table, two lines for each number of patterns."""
    table = Table(f"topic matching: {len(TOPICS)} topics of three tokens, of which some fit", ["one call"])
    calls = CALLS_QUICK if quick else CALLS
    for number in PATTERNS:
        patterns = list(islice(cycle(["logs.web1.*", "logs.*.cron", "metrics.>"]), min(number, 3)))
        patterns += [f"logs.rack{n}.*" for n in range(number - len(patterns))]
        trie = PatternSet((pattern, index) for index, pattern in enumerate(patterns))
        split = [pattern.split(".") for pattern in patterns]
        contenders = {
            "compiled (what a subscription uses)": Matcher(patterns).matches,
            "trie (says which of them fit)": trie.match,
        }
        lines = [
            Line(f"{number} pattern{'s' * (number > 1)}, {name}", "ns", raw_name="token by token")
            for name in contenders
        ]
        for run in range(runs):
            progress(f"matching, {number} patterns: run {run + 1}/{runs}")
            raw = _time(lambda topic, split=split: _naive(split, topic), max(1, calls // number))  # type: ignore[misc]
            for line, matches in zip(lines, contenders.values(), strict=True):
                line.raw.append(raw)
                line.ours.append(_time(matches, calls))
        table.lines += lines
    return [table]


def _time(matches: Callable[[str], object], calls: int) -> float:
    """Nanoseconds a call."""
    topics = list(islice(cycle(TOPICS), calls))
    start = perf_counter()
    for topic in topics:
        matches(topic)
    return (perf_counter() - start) / calls * 1e9


def _naive(patterns: Sequence[Sequence[str]], topic: str) -> bool:
    tokens = topic.split(".")
    for pattern in patterns:
        if pattern[-1] == ">":
            if len(tokens) >= len(pattern) and _fits(pattern[:-1], tokens):
                return True
        elif len(pattern) == len(tokens) and _fits(pattern, tokens):
            return True
    return False


def _fits(pattern: Sequence[str], tokens: Sequence[str]) -> bool:
    return all(own in ("*", token) for own, token in zip(pattern, tokens, strict=False))
