"""The commands: what is documented exists and the reverse, every mistake gets one clear line, and real processes."""

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
from zmqbus.cli.pubsub import Pacer
from zmqbus.cli.shell.output import loss_report
from zmqbus.cli.shell.stopping import Stopped
from zmqbus.errors import (
    AuthError,
    FormatError,
    GapError,
    KeyFileError,
    MessageTooLarge,
    NodeClosed,
    ParseError,
    SetupError,
    TopicError,
    UnsupportedValue,
    WaitTimeout,
    WhereError,
    ZmqbusError,
)
from zmqbus.net.keys import BusKey

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


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_and_option_is_documented(name: str) -> None:
    command = cli.commands[name]
    assert f"[`{name}`](#{name})" in DOCS
    described = section(name)
    missing = options_of(command) - named(described)
    assert not missing, f"docs/cli.md does not mention {missing} of {name}"
    usage = described.split("```")[1]
    unknown = named(usage) - options_of(command)
    assert not unknown, f"docs/cli.md shows {unknown}, which {name} does not have"
    rows = {option for row in re.findall(r"^\| (`-.*?) \|", described, re.MULTILINE) for option in named(row)}
    assert rows == options_of(command), "the table of options"


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_is_in_the_help(name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert options_of(cli.commands[name]) <= named(out)
    for param in cli.commands[name].params:
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


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, str]] = [
    (["pub", "bad topic", "x"], 2, "white space"),
    (["pub", "a.*", "x"], 2, "wildcard"),
    (["pub", "$sys.a", "x"], 2, "reserved"),
    (["pub", "", "x"], 2, "empty"),
    (["sub"], 2, "PATTERN"),
    (["sub", "a.>.b"], 2, "only come last"),
    (["tap", "a..b"], 2, "empty"),
    (["tap", "-x", "a..b"], 2, "empty"),
    (["topics", "a b"], 2, "white space"),
    (["tap", "--where", "value +"], 2, "bad expression"),
    (["tap", "--where", "__import__('os')"], 2, "unknown function"),
    (["tap", "-F", "{nope}"], 2, "unknown field"),
    (["tap", "-F", "{"], 2, "bad format"),
    (["tap", "-F", "x", "--json"], 2, "choose one"),
    (["tap", "--hex", "--json"], 2, "choose one"),
    (["tap", "--subjects", "--last-per-topic"], 2, "leave out"),
    (["sub", "a", "-F", "x", "--json"], 2, "choose one"),
    (["sub", "a", "--for", "soon"], 2, "is not a duration"),
    (["sub", "a", "-n", "0"], 2, "-n"),
    (["sub", "a", "-n", "many"], 2, "'many' is not a whole number"),
    (["sub", "a", "-F", ""], 2, "it is empty"),
    (["tap", "-F", ""], 2, "it is empty"),
    (["sub", "a", "--history", "-1"], 2, "--history"),
    (["sub", "a", "--nope"], 2, "No such option"),
    (["pub", "t", "--json", "{"], 2, "is not a JSON value"),
    (["pub", "t", "--json", "18446744073709551616"], 2, "64 bits"),
    (["pub", "t", "x", "-H", "novalue"], 2, "KEY=VALUE"),
    (["pub", "t", "x", "--count", "0"], 2, "--count"),
    (["pub", "t", "x", "--rate", "0"], 2, "--rate"),
    (["pub", "t", "x", "--rate", "nan"], 2, "is not a rate"),
    (["pub", "t", "x", "--rate", "inf"], 2, "is not a rate"),
    (["pub", "t", "x", "--rate", "1e-300"], 2, "is not a rate"),
    (["pub", "t", "-", "extra"], 2, "leave out the rest"),
    (["pub", "t", "extra", "-"], 2, "leave out the rest"),
    (["--key-file", "", "nodes"], 2, "--key-file is empty"),
    (["keygen", "-"], 2, "name one, such as bus.key"),
    (["--bus", "other", "demo"], 2, "demo has a bus of its own, on the loopback interface: leave out --bus"),
    (["--peer", "tcp://127.0.0.1:9", "demo"], 2, "leave out --peer"),
    (["pub", "t", "-", "--count", "2"], 2, "--count repeats"),
    (["pub", "t", "-5"], 2, "comes after --"),
    (["pub", "t", "x", "--wait-subscribers", "1", "--timeout", "20ms"], 3, "waited 0.02 s"),
    (["sub", "t", "-n", "1", "--for", "20ms"], 3, "0 messages received"),
    (["tap", "-n", "1", "--for", "20ms"], 3, "0 messages shown"),
    (["tap", "--bus", "x"], 2, "belongs before the command"),
    (["nope"], 2, "No such command"),
    (["--nope", "tap"], 2, "No such option"),
    (["--bus", "", "tap"], 1, "bus name"),
    (["--bus", "x" * 100, "tap"], 1, "bus name"),
    (["--peer", "nonsense", "nodes"], 1, "tcp://HOST:PORT"),
    (["--peer", "tcp://127.0.0.1:70000", "nodes"], 1, "tcp://HOST:PORT"),
    (["--peer", "tcp://192.0.2.77:9", "nodes"], 1, "without a bus key"),
    (["--interface", "nonsense0", "nodes"], 1, "there are: "),
    (["--key-file", "/nonexistent/key", "nodes"], 77, "not found"),
    (["--key-file", "/dev", "nodes"], 77, "regular file"),
    (["--key-file", "/proc/version", "nodes"], 77, "key file"),
    (["keygen"], 2, "FILE"),
    (["keygen", "/nonexistent/key"], 77, "cannot be created"),
    (["completion", "tcsh"], 2, "tcsh"),
    (["demo", "/nonexistent.log"], 2, "not a readable file"),
    (["demo", "/dev/null"], 2, "not a readable file"),
    (["demo", "--seconds", "0"], 2, "--seconds"),
    (["demo", "--seconds", "11m"], 2, "is not between 1s and 600s"),
    (["demo", "--rate", "x"], 2, "is not a whole number"),
]


@pytest.mark.parametrize(
    ("args", "code", "words"), MISTAKES, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None
)
def test_a_mistake_gets_one_clear_line(args: list[str], code: int, words: str) -> None:
    got, out, err = run(*args)
    assert (got, out) == (code, "")
    assert err.startswith("zmqbus: ")
    assert words in err
    lines = err.splitlines()
    assert len(lines) == (3 if "bad expression" in err else 1)


def test_key_files_that_others_can_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bus.key"
    BusKey.generate().save(path)
    path.chmod(0o644)
    code, _, err = run("--key-file", str(path), "nodes")
    assert code == 77
    assert "chmod 600" in err
    path.chmod(0o600)
    code, _, err = run("keygen", str(path))
    assert code == 77
    assert "not overwritten" in err


def test_bad_lines_are_named_and_the_others_are_published() -> None:
    code, out, err = run("pub", "t", "--json", "--wait-subscribers", "0", text='{"a": 1}\n\nnonsense\n')
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "zmqbus: published 1 message on t to 0 subscribers"
    assert "(line 3 of standard input)" in err.splitlines()[1]


def test_standard_input_that_is_closed() -> None:
    command = f"exec {sys.executable} -m zmqbus pub t <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "give a VALUE" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TopicError("a b", "x"), 2),
        (ParseError("duration", "x", "y"), 2),
        (WhereError("x", 0, "y"), 2),
        (FormatError("x", "y"), 2),
        (UnsupportedValue(object(), "x"), 2),
        (MessageTooLarge(2, 1), 2),
        (WaitTimeout("x", 0, 1, 1.0), 3),
        (GapError("t", 1, 1, 2), 4),
        (KeyFileError("k", "x"), 77),
        (AuthError("x"), 77),
        (SetupError("x"), 1),
        (NodeClosed("x"), 1),
        (ZmqbusError("x"), 1),
        (PermissionError(13, "Permission denied", "/x"), 74),
        (OSError(28, "No space left on device"), 74),
        (BrokenPipeError(), 141),
        (KeyboardInterrupt(), 130),
        (Stopped(signal.SIGTERM), 143),
        (RuntimeError("x"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_has_its_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert shell.guarded(fail) == code
    err = capsys.readouterr().err
    assert err == "" if code in (130, 141, 143) else re.fullmatch(r"zmqbus: [^\n]+(\n [^\n]+)*\n", err)


def test_our_own_errors_show_where_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMQBUS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        shell.guarded(lambda: 1 // 0)


# --- publish and subscribe, in processes of their own --------------------------------------------


def test_pub_reaches_sub_and_tap(start: Callable[..., subprocess.Popen[str]]) -> None:
    sub = start("sub", "greet.>", "--json", "-n", "5")
    tap = start("tap", "-x", "greet.noise", "--where", "size > 2 or value == null", "-n", "4")
    code, out, err = run("pub", "greet.world", "hello", "two words", "-H", "a=b=c", "--wait-subscribers", "2")
    assert (code, out) == (0, "")
    assert err == "zmqbus: published 2 messages on greet.world to 2 subscribers, all confirmed\n"
    assert run("pub", "greet.noise", "--json", "-q", "--wait-subscribers", "2", "--", "-5") == (0, "", "")
    _, _, err = run("pub", "greet.lines", "--wait-subscribers", "2", text=b"plain\r\nl\xff\n")
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
        node.wait_for_subscribers("talk", 1, PATIENCE)
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
        node.wait_for_subscribers("big", 1, PATIENCE)
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
        node.wait_for_subscribers("t.a", 4, PATIENCE)
        for i in range(4):
            node.publish("t.a", f"text {i}")
        node.publish("t.b", b"\x00raw")
        (plain, table, latest, dump) = (finish(tap)[1] for tap in taps)
    assert re.match(r"topic +messages +bytes +rate +bandwidth\nt\.a +4 +28 B +\S+ +\S+ \S+\nt\.b +1 +6 B ", plain)
    rows = [json.loads(line) for line in table.splitlines()]
    assert [(row["topic"], row["messages"], row["bytes"]) for row in rows] == [("t.a", 4, 28), ("t.b", 1, 6)]
    assert [line.split("  ")[1:3] for line in latest.splitlines()] == [["t.a", "web#4"], ["t.b", "web#1"]]
    assert "00000000  00 72 61 77" in dump


def test_tap_never_waits_for_its_reader(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    """Its output is a pipe that nobody reads: messages pass by unseen, and it ends at once when asked to."""
    total = 150_000
    with zmqbus.Node("fast", bus=bus) as node:
        tap = start("tap", "fast")
        node.wait_for_subscribers("fast", 1, PATIENCE)
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
        code, out, _ = run("nodes", "--json", "--wait", "500ms")
        [row] = [json.loads(line) for line in out.splitlines()]
        assert (row["name"], row["origin"], row["pid"]) == ("web-1", f"{node.origin:016x}", os.getpid())
        assert row["inbox"] == node.endpoints["inbox"]
        code, out, _ = run("nodes", "--wait", "500ms")
        assert out.splitlines()[0].split() == ["name", "origin", "host", "pid", "role", "inbox", "release", "age"]
        assert f"{node.origin:016x}" in out.splitlines()[1]

        code, out, _ = run("topics", "logs.*", "--json", "--wait", "500ms")
        rows = [json.loads(line) for line in out.splitlines()]
        assert [(row["topic"], row["node"], row["seq"]) for row in rows] == [
            ("logs.a", "web-1", 2),
            ("logs.b", "web-1", 1),
        ]
        code, out, _ = run("topics", "--wait", "500ms")
        assert [line.split()[0] for line in out.splitlines()] == ["topic", "logs.a", "logs.b", "other"]
        code, out, err = run("topics", "nothing.*", "--wait", "500ms")
        assert (code, out) == (0, "")
        assert "has published on such a topic" in err


def test_watching_nodes_come_and_go(start: Callable[..., subprocess.Popen[str]], bus: str) -> None:
    watcher = start("nodes", "--watch", "--json")
    assert watcher.stdout is not None
    with zmqbus.Node("visitor", bus=bus):
        joined = json.loads(watcher.stdout.readline())
    left = json.loads(watcher.stdout.readline())
    assert [(row["event"], row["name"]) for row in (joined, left)] == [("joined", "visitor"), ("left", "visitor")]
    watcher.send_signal(signal.SIGINT)
    assert finish(watcher) == (130, "", "")


def test_a_key_from_keygen_joins_a_bus(tmp_path: Path, bus: str) -> None:
    path = tmp_path / "my bus.key"
    code, out, _ = run("keygen", str(path))
    assert code == 0
    assert path.stat().st_mode & 0o777 == 0o600
    key = BusKey.load(path)
    assert key.fingerprint in out
    assert path.read_text().strip() not in out
    assert f"zmqbus --key-file '{path}' nodes" in out
    with zmqbus.Node("member", bus=bus, key=key, interface="127.0.0.1") as node:
        options = ["--key-file", str(path), "--interface", "127.0.0.1", "--peer", node.endpoints["inbox"]]
        _, out, _ = run(*options, "nodes", "--json", "--wait", "1s")
        assert [json.loads(line)["name"] for line in out.splitlines()] == ["member"]
        assert run("nodes", "--json", "--wait", "300ms")[1] == ""  # without it


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
