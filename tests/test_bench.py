"""tools/bench: that it runs, counts, and leaves nothing behind. Never how fast anything is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
BENCH = [sys.executable, str(TOOLS / "bench")]
COMMANDS = (
    *("all", "durable", "idle", "join", "many", "match", "pubsub", "queue", "readback", "recovery", "request"),
    "roundtrip",
)

sys.path.append(str(TOOLS))

from bench.report import as_markdown  # noqa: E402  (tools is no package)
from bench.results import Budget, Line, Table  # noqa: E402


def bench(*arguments: str, status: int = 0) -> str:
    done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_help_names_every_command() -> None:
    text = bench("--help")
    for command in COMMANDS:
        assert f"  {command} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_common_options(command: str) -> None:
    text = bench(command, "--help")
    for option in ("--runs", "--quick", "--json", "--markdown", "--check"):
        assert option in text


def test_match_compares_both_ways_of_matching_with_the_plain_one() -> None:
    (table,) = json.loads(bench("match", "--quick", "--json"))["results"]
    assert len(table["lines"]) == 8
    assert all(line["ours"]["median"] > 0 and line["raw"]["median"] > 0 for line in table["lines"])


def test_pubsub_counts_every_message() -> None:
    report = json.loads(bench("pubsub", "--quick", "--json", "--size", "16", "--fan", "2", "--face", "sync"))
    assert_machine_and_noise(report)
    assert report["settings"]["sizes"] == ["16"]
    (table,) = report["results"]
    assert [line["label"] for line in table["lines"]] == [
        "16 B, publish(topic, value)",
        "16 B, publisher(topic).send(value)",
        "16 B, publisher(topic).send_many(values)",
    ]
    for line in table["lines"]:
        assert line["lost"] == 0
        assert line["raw_name"] in ("pyzmq, no HWM", "pyzmq, NODROP")
        assert len(line["ours"]["runs"]) == len(line["raw"]["runs"]) == len(line["ratios"]["runs"]) == 1
        assert line["ratios"]["median"] == pytest.approx(line["ours"]["median"] / line["raw"]["median"])
        assert all(value > 0 for value in line["details"].values())


def test_roundtrip_in_asyncio() -> None:
    report = json.loads(bench("roundtrip", "--quick", "--json", "--face", "async"))
    assert_machine_and_noise(report)
    (table,) = report["results"]
    assert [line["label"] for line in table["lines"]] == [
        f"AsyncNode, {pace}, {percentile}" for pace in ("low rate", "back to back") for percentile in ("p50", "p99")
    ]
    for p50, p99 in (table["lines"][:2], table["lines"][2:]):
        assert 0 < p50["ours"]["median"] <= p99["ours"]["median"]
        assert 0 < p50["raw"]["median"] <= p99["raw"]["median"]
        assert p50["passed"] is None  # no budget: for information


def test_request_is_measured_for_every_kind_of_responder() -> None:
    report = json.loads(bench("request", "--quick", "--json"))
    assert_machine_and_noise(report)
    (table,) = report["results"]
    assert [line["label"] for line in table["lines"]] == [
        f"{kind}, {pace}, {percentile}"
        for pace in ("low rate", "back to back")
        for kind in ("Node, inline", "Node, threads", "Node, loop", "AsyncNode")
        for percentile in ("p50", "p99")
    ]
    assert all(line["ours"]["median"] > 0 and line["raw"]["median"] > 0 for line in table["lines"])
    assert [line["label"] for line in table["lines"] if line["budget"]] == ["Node, inline, low rate, p50"]


def test_durable_is_measured_beside_the_live_rate_and_the_disk(tmp_path: Path) -> None:
    report = json.loads(bench("durable", "--quick", "--json", "--directory", str(tmp_path)))
    (table,) = report["results"]
    labels = [line["label"] for line in table["lines"]]
    assert labels[0] == "pipelined, 1 publisher"
    assert all(line["ours"]["median"] > 0 and line["raw"]["median"] > 0 for line in table["lines"])
    assert list(tmp_path.iterdir()) == []


def test_readback_reads_every_message(tmp_path: Path) -> None:
    (table,) = json.loads(bench("readback", "--quick", "--json", "--directory", str(tmp_path)))["results"]
    assert [line["lost"] for line in table["lines"]] == [0, 0]
    assert all(line["ours"]["median"] > 0 for line in table["lines"])


def test_recovery_comes_to_a_first_acknowledgement(tmp_path: Path) -> None:
    (table,) = json.loads(bench("recovery", "--quick", "--json", "--directory", str(tmp_path)))["results"]
    assert all(line["ours"]["median"] > 0 for line in table["lines"])


def test_queue_does_every_job(tmp_path: Path) -> None:
    tables = json.loads(bench("queue", "--quick", "--json", "--directory", str(tmp_path)))["results"]
    throughput, latency, uneven, backlog = (table["lines"] for table in tables)
    assert all(line["ours"]["median"] > 0 for line in [*throughput, *latency, *backlog, uneven[0]])
    assert all(line["raw"]["median"] > 0 for line in [*throughput, *latency, *uneven[:2]])
    done, _, killed = uneven
    assert done["lost"] == killed["lost"] == 0
    assert list(tmp_path.iterdir()) == []


def assert_machine_and_noise(report: dict[str, Any]) -> None:
    assert {"cpus", "kernel", "python", "pyzmq", "libzmq", "zmqbus"} <= set(report["machine"])
    assert {"load_before", "load_after", "cpu_of_others_percent", "raw_spread_percent"} <= set(report["noise"])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_ctrl_c_leaves_no_worker_behind() -> None:
    process = subprocess.Popen([*BENCH, "pubsub", "--size", "1m"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        workers = wait_for_children(process.pid, 2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def wait_for_children(pid: int, number: int) -> list[int]:
    deadline = time.monotonic() + 30
    while True:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        if len(children) >= number:
            return children
        assert time.monotonic() < deadline, children
        os.sched_yield()
        time.sleep(0.01)


# --- verdicts and tables -------------------------------------------------------------------------


def test_the_ratio_is_that_of_neighbouring_runs() -> None:
    line = Line("x", "/s", ours=[20.0, 60.0, 30.0], raw=[10.0, 20.0, 10.0], budget=Budget("ratio", at_least=2.9))
    assert line.ratios == [2.0, 3.0, 3.0]
    assert line.passed is True


def test_a_budget_may_be_an_upper_limit_of_the_value() -> None:
    assert Line("x", "ms", ours=[40.0, 60.0, 45.0], budget=Budget("value", at_most=50)).passed is True
    assert Line("x", "ms", ours=[40.0, 60.0, 55.0], budget=Budget("value", at_most=50)).passed is False
    assert Line("x", "ms", ours=[40.0]).passed is None


def test_loss_fails_whatever_the_rate() -> None:
    assert Line("x", "/s", ours=[30.0], raw=[10.0], budget=Budget("ratio", at_least=2), lost=1).passed is False
    assert Line("x", "/s", ours=[30.0], raw=[10.0], budget=Budget("ratio", at_least=2), lost=0).passed is True


def test_markdown_is_a_table() -> None:
    line = Line(
        "16 B", "/s", [2.5e6, 3.5e6, 3e6], [1e6, 1e6, 1e6], "pyzmq", budget=Budget("ratio", at_least=2.3), lost=0
    )
    noise = {"load_before": 0.1, "load_after": 0.2, "cpu_of_others_percent": 1.0}
    rows = [row for row in as_markdown([Table("title", ["note"], [line])], noise).splitlines() if row.startswith("|")]
    assert [len(row.split("|")) for row in rows] == [len(rows[0].split("|"))] * 3
    assert "| 3 M/s (2.5 M\N{EN DASH}3.5 M) | 3\N{MULTIPLICATION SIGN} (2.5\N{EN DASH}3.5) |" in rows[2]
    assert rows[2].endswith("| ✓ |")
