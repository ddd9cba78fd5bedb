"""The commands: what is documented exists and the reverse, and they do what is documented, in real processes."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import zmqbus
from tests.cli.commands import PATIENCE, finish, run
from zmqbus.cli import shell
from zmqbus.cli.group import cli
from zmqbus.cli.pubsub import pub
from zmqbus.cli.pubsub.tap import drain
from zmqbus.cli.shell.input import Pacer
from zmqbus.cli.shell.output import loss_report

COMMANDS = cli.commands | {
    f"{name} {below}": command
    for name, group in cli.commands.items()
    if isinstance(group, click.Group)
    for below, command in group.commands.items()
}
DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


# --- what is documented exists, and the reverse ------------------------------------------------


def options_of(command: click.Command) -> set[str]:
    return {name for param in command.params if isinstance(param, click.Option) for name in param.opts}


def section(name: str) -> str:
    found = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", DOCS, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/cli.md has no section about {name}"
    return found[1]


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--?[a-zA-Z][a-z-]*)", text))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(name: str) -> None:
    command = COMMANDS[name]
    assert f"[`{name}`](#{name.replace(' ', '-')})" in DOCS
    described = section(name)
    missing = options_of(command) - named(described)
    assert not missing, f"docs/cli.md does not mention {missing} of {name}"
    usage = described.split("```")[1]
    unknown = named(usage) - options_of(command)
    assert not unknown, f"docs/cli.md shows {unknown}, which {name} does not have"
    rows = {option for row in re.findall(r"^\| (`-.*?) \|", described, re.MULTILINE) for option in named(row)}
    assert rows == options_of(command), "the table of options"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_help(name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert options_of(COMMANDS[name]) <= named(out)
    for param in COMMANDS[name].params:
        assert not isinstance(param, click.Option) or param.help, param.name


def test_global_options_and_variables_are_documented() -> None:
    documented = section("Global options")
    assert options_of(cli) - {"--version"} <= named(documented)
    for param in cli.params:
        if isinstance(param, click.Option) and param.envvar:
            assert f"`{param.envvar}`" in documented
    assert "--version" in named(DOCS)


def test_exit_codes_are_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)}
    assert documented == set(shell.EXIT_CODES)
    _, out, _ = run("--help")
    for code, meaning in shell.EXIT_CODES.items():
        assert f"{code:3}  {meaning}" in out


def test_help_is_quick_because_it_imports_little() -> None:
    program = (
        "import sys\nfrom zmqbus.cli import main\nsys.argv = ['zmqbus', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print({'zmq', 'zeroconf', 'rich', 'ifaddr', 'asyncio', 'multiprocessing'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version_and_no_arguments() -> None:
    assert run("--version") == (0, f"zmqbus {zmqbus.__version__}\n", "")
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_completion(start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bash", "zsh", "fish"):
        code, out, _ = run("completion", name)
        assert code == 0
        assert f"_ZMQBUS_COMPLETE={name}_complete" in out
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert "zsh_complete" in run("completion")[1]
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert run("completion")[0] == 2
    words = {"_ZMQBUS_COMPLETE": "bash_complete", "COMP_WORDS": "zmqbus t", "COMP_CWORD": "1"}
    _, out, _ = finish(start(env=os.environ | words))
    assert out.split() == ["plain,tap", "plain,topics"]


# --- publish and subscribe, in processes of their own --------------------------------------------


def test_pub_reaches_sub_and_tap(
    start: Callable[..., subprocess.Popen[str]], bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = pub._wait_for

    def wait_patiently(node: zmqbus.Node, topic: str, wanted: int, timeout: float | None, **options: bool) -> int:
        return wait(node, topic, wanted, PATIENCE if wanted <= 2 else timeout, **options)

    monkeypatch.setattr(pub, "_wait_for", wait_patiently)  # sub and tap may be busy; nobody else is waited for
    sub = start("sub", "greet.>", "--json", "-n", "5")
    tap = start("tap", "-x", "greet.noise", "--where", "size > 2 or value == null", "-n", "4")
    with zmqbus.Node("probe", bus=bus) as probe:
        probe.wait_for_subscribers("greet.world", 2, 20, observers=True)
    code, out, err = run("pub", "greet.world", "hello", "two words", "-H", "a=b=c")
    assert (code, out) == (0, "")
    assert err == "zmqbus: published 2 messages on greet.world to 1 subscriber, all confirmed\n"
    assert run("pub", "greet.noise", "--json", "-q", "--", "-5") == (0, "", "")
    _, _, err = run("pub", "greet.lines", text=b"plain\r\nl\xff\n")
    assert "published 2 messages on greet.lines" in err

    code, out, err = finish(sub)
    assert code == 0
    assert re.fullmatch(r"zmqbus: 5 messages received(, \d of them fetched from history)?; nothing lost\n", err)
    messages = [json.loads(line) for line in out.splitlines()]
    assert [(message["topic"], message["seq"], message["value"]) for message in messages] == [
        ("greet.world", 1, "hello"),
        ("greet.world", 2, "two words"),
        ("greet.noise", 1, -5),
        ("greet.lines", 1, "plain"),
        ("greet.lines", 2, {"$bytes": "bP8="}),
    ]
    assert messages[0]["headers"] == {"a": "b=c"}
    assert re.fullmatch(r"pub-\d+", messages[0]["node"])

    code, out, err = finish(tap)
    assert (code, err) == (0, "zmqbus: 5 messages seen, 4 matched and shown; nothing lost\n")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3}  greet\.world  pub-\d+#1  6 B  \S+  \[a=b=c\]  hello", out.splitlines()[0]
    )
    assert re.fullmatch(r'.*  greet\.lines  pub-\d+#2  4 B  \S+  b"l\\xff"', out.splitlines()[-1])


def test_sub_begins_with_history_and_formats(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    with zmqbus.Node("keeper", bus=bus) as node:
        for i in range(20):
            node.publish("count", {"i": i})
        sub = start("sub", "count", "--history", "10", "-n", "10", "-F", "{node}#{seq} {value.i:03d} {value.nope}|")
        code, out, err = finish(sub)
    assert code == 0
    assert out.splitlines() == [f"keeper#{i + 1} {i:03d} |" for i in range(10, 20)]
    assert err == "zmqbus: 10 messages received, 10 of them fetched from history; nothing lost\n"


def test_sub_is_plain_and_whole_in_a_pipe(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    """Also a log line that is not UTF-8, and binary of any length."""
    with zmqbus.Node("keeper", bus=bus) as node:
        for value in ("plain", b"GET /caf\xe9?" + b"x" * 100, bytes(range(100)), {"raw": b"caf\xe9"}):
            node.publish("t", value)
        code, out, _ = finish(start("sub", "t", "--history", "9", "-n", "4"))
    assert code == 0
    text, binary = r'b"GET /caf\xe9?' + "x" * 100 + '"', bytes(range(100)).hex()
    first, second, third, fourth = out.splitlines()
    assert (first, second, fourth) == ("t  plain", f"t  {text}", r't  {"raw":b"caf\xe9"}')
    assert third.startswith(f"t  {binary} |....")


def test_pub_repeats_at_a_rate_and_says_that_nobody_listens(
    start: Callable[..., subprocess.Popen[str]], bus: str
) -> None:
    with zmqbus.Node("listener", bus=bus) as node, node.subscribe("beat") as beats:
        pub = start("pub", "beat", "a", "b", "--count", "3", "--rate", "100")
        assert [next(beats).value for _ in range(6)] == ["a", "b"] * 3
        assert beats.get(0.5) is None  # looks for more, and so confirms that it has all
        code, _, err = finish(pub)
        assert code == 0
    assert err == "zmqbus: published 6 messages on beat to 1 subscriber, all confirmed\n"
    code, _, err = run("pub", "beat", "a", "--timeout", "20ms")
    assert (code, err) == (0, "zmqbus: published 1 message on beat; nobody was subscribed to it\n")


def test_a_reader_that_leaves_ends_it_quietly(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    with zmqbus.Node("talker", bus=bus) as node:
        sub = start("sub", "talk")
        node.wait_for_subscribers("talk", 1, PATIENCE, observers=True)
        assert sub.stdout is not None
        sub.stdout.close()
        assert sub.stderr is not None
        while sub.poll() is None:
            node.publish("talk", "hi")
            select.select([sub.stderr], [], [], 0.05)
        assert (sub.returncode, sub.stderr.read()) == (141, "")


def test_output_that_cannot_be_written(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    with zmqbus.Node("talker", bus=bus) as node, open("/dev/full", "w") as full:
        node.publish("talk", "hi")
        code, _, err = finish(start("sub", "talk", "--history", "1", "-q", stdout=full))
    assert (code, err) == (74, "zmqbus: No space left on device\n")


def test_losses_are_reported_with_ranges(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    """A publisher without history, and a subscriber that is stopped until the queues between them overflow."""
    with zmqbus.Node("forgetful", bus=bus, history_bytes=0) as node:
        tap = start("tap", "big", "--where", "value == 'end'", "-F", "{value}", "-n", "1", "--fail-on-loss", "-q")
        node.wait_for_subscribers("big", 1, PATIENCE, observers=True)
        tap.send_signal(signal.SIGSTOP)
        for _ in range(1500):
            node.publish("big", bytes(16_000))
        tap.send_signal(signal.SIGCONT)
        while tap.poll() is None:
            node.publish("big", "end")
            select.select([], [], [], 0.05)
        code, out, err = finish(tap)
    assert (code, out) == (4, "end\n")
    first, *ranges = err.splitlines()
    found = re.fullmatch(r"zmqbus: [\d,]+ messages? (?:seen, 1 matched and )?shown; ([\d,]+) messages? lost:", first)
    assert found is not None, err
    counts = [re.fullmatch(r"  big  forgetful#(\d+)(?: to #(\d+))? \(([\d,]+)\)", line) for line in ranges]
    lost = [(int(gap[1]), int(gap[2] or gap[1]), int(gap[3].replace(",", ""))) for gap in counts if gap is not None]
    assert len(lost) == len(ranges) > 0
    assert all(last - first + 1 == count for first, last, count in lost)
    assert sum(count for _, _, count in lost) == int(found[1].replace(",", ""))


def test_a_report_names_twenty_ranges() -> None:
    gaps = [zmqbus.Gap("t\x1b", 1, 10 * i + 1, 10 * i + 2) for i in range(25)]
    subscription: Any = SimpleNamespace(lost=50, gaps=gaps)
    lines = loss_report(subscription, lambda origin: "").splitlines()
    assert lines[0] == "50 messages lost:"
    assert lines[1] == r"  t\x1b  0000000000000001#1 to #2 (2)"
    assert lines[21:] == ["  … and 5 more ranges"]


# --- tap ---------------------------------------------------------------------------------------


def test_tap_shows_tables_and_last_messages(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    with zmqbus.Node("web", bus=bus) as node:
        taps = [
            start("tap", "t.*", "-n", "5", *view)
            for view in (
                ["--subjects"],
                ["--subjects", "--json"],
                ["--last-per-topic"],
                ["--hex"],
            )
        ]
        node.wait_for_subscribers("t.a", 4, PATIENCE, observers=True)
        for i in range(4):
            node.publish("t.a", f"text {i}")
        node.publish("t.b", b"\x00raw")
        (plain, table, latest, dump) = (finish(tap)[1] for tap in taps)
    assert re.match(r"topic +messages +bytes +rate +bandwidth\nt\.a +4 +28 B +\S+ +\S+ \S+\nt\.b +1 +6 B ", plain)
    rows = [json.loads(line) for line in table.splitlines()]
    assert [(row["topic"], row["messages"], row["bytes"]) for row in rows] == [("t.a", 4, 28), ("t.b", 1, 6)]
    assert [line.split("  ")[1:3] for line in latest.splitlines()] == [["t.a", "web#4"], ["t.b", "web#1"]]
    assert "00000000  00 72 61 77" in dump


def test_a_full_queue_drops_the_oldest_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "MESSAGES_MAX", 10)
    monkeypatch.setattr(drain, "BYTES_MAX", 1000)

    def left(sizes: list[int]) -> tuple[list[int], int]:
        messages: Any = [zmqbus.Message("t", bytes(size), i + 1, 1, 0.0) for i, size in enumerate(sizes)]
        queue = drain.Drain(messages)
        while queue.dropped + len(queue) < len(sizes):
            select.select([], [], [], 0.001)
        return [message.seq for message in queue.take(0)], queue.dropped

    assert left([1] * 10) == (list(range(1, 11)), 0)
    assert left([1] * 25) == (list(range(16, 26)), 15)
    assert left([400] * 5) == ([4, 5], 3)
    assert left([1, 5000]) == ([2], 1)  # one that is larger is shown nevertheless


def test_tap_never_waits_for_its_reader(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    """Its output is a pipe that nobody reads: messages pass by unseen, and it ends at once when asked to."""
    total = 150_000
    with zmqbus.Node("fast", bus=bus) as node:
        tap = start("tap", "fast")
        node.wait_for_subscribers("fast", 1, PATIENCE, observers=True)
        send = node.publisher("fast").send
        for i in range(total):
            send(i)
        assert node.close(PATIENCE) == []  # all of it has been taken in
    tap.send_signal(signal.SIGINT)
    tap.wait(PATIENCE)
    code, _, err = finish(tap)
    assert code == 130
    found = re.fullmatch(
        r"zmqbus: ([\d,]+) messages seen, ([\d,]+) matched, ([\d,]+) shown; ([\d,]+) not shown: .*; nothing lost\n",
        err,
    )
    assert found is not None, err
    seen, matched, shown, unseen = (int(number.replace(",", "")) for number in found.groups())
    assert total - 1000 < seen == matched + unseen <= total
    assert 0 < shown < matched
    assert unseen >= total / 2


# --- who is there ------------------------------------------------------------------------------


def test_nodes_and_topics(bus: str) -> None:
    code, out, err = run("nodes", "--wait", "20ms")
    assert (code, out, err) == (0, "", f"zmqbus: no other node is on bus {bus!r}\n")
    with zmqbus.Node("web\x7f1".replace("\x7f", "-"), bus=bus) as node:
        node.publish("logs.a", "x")
        node.publish("logs.a", "x")
        node.publish("logs.b", "x")
        node.publish("other", "x")
        code, out, _ = run("nodes", "--json", "--wait", "500ms", others=1)
        [row] = [json.loads(line) for line in out.splitlines()]
        assert (row["name"], row["origin"], row["pid"]) == ("web-1", f"{node.origin:016x}", os.getpid())
        assert row["inbox"] == node.endpoints["inbox"]
        code, out, _ = run("nodes", "--wait", "500ms", others=1)
        headings = "name origin host pid role inbox release age claims"
        assert out.splitlines()[0].split() == headings.split()
        assert f"{node.origin:016x}" in out.splitlines()[1]

        code, out, _ = run("topics", "logs.*", "--json", "--wait", "500ms", others=1)
        rows = [json.loads(line) for line in out.splitlines()]
        assert [(row["topic"], row["node"], row["seq"]) for row in rows] == [
            ("logs.a", "web-1", 2),
            ("logs.b", "web-1", 1),
        ]
        code, out, _ = run("topics", "--wait", "500ms", others=1)
        assert [line.split()[0] for line in out.splitlines()] == ["topic", "logs.a", "logs.b", "other"]
        code, out, err = run("topics", "nothing.*", "--wait", "500ms", others=1)
        assert (code, out) == (0, "")
        assert "published on such a topic" in err
    with zmqbus.Node("silent", bus=bus):
        code, out, err = run("topics", "--wait", "500ms", others=1)
        assert (code, out, err) == (0, "", f"zmqbus: the one other node on bus {bus!r} has not published anything\n")


def test_watching_nodes_come_and_go(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    watcher = start("nodes", "--watch", "--json")
    assert watcher.stdout is not None
    with zmqbus.Node("visitor", bus=bus):
        joined = json.loads(watcher.stdout.readline())
    left = json.loads(watcher.stdout.readline())
    assert [(row["event"], row["name"]) for row in (joined, left)] == [("joined", "visitor"), ("left", "visitor")]
    watcher.send_signal(signal.SIGINT)
    assert finish(watcher) == (130, "", "")


# --- pacing ------------------------------------------------------------------------------------


def test_pacing_by_absolute_deadlines() -> None:
    pacer, time = Pacer(10.0), 100.0
    sent = []
    for i in range(50):
        time += pacer.delay(time)
        sent.append(time)
        time += 0.03 if i % 7 else 0.25  # what sending takes; now and then longer than the period
    assert sent[0] == 100.0
    assert sent[-1] == pytest.approx(100.0 + 49 * 0.1)  # no error has added up
    assert pacer.delay(200.0) == 0.0  # after a pause of input: no burst to make up for it
    assert pacer.delay(200.0) == pytest.approx(0.1)
