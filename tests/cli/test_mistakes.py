"""Every mistake gets one clear line, and a code; so does a key that does not fit. Options in the environment."""

from __future__ import annotations

import json
import re
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import zmqbus
from tests.cli.commands import PATIENCE, run
from zmqbus.cli import shell
from zmqbus.cli.shell import input as given
from zmqbus.cli.shell.input import lines
from zmqbus.cli.shell.stopping import Stopped
from zmqbus.errors import (
    AuthError,
    FormatError,
    GapError,
    JournalCorrupt,
    JournalFailed,
    JournalLocked,
    JournalUnavailable,
    JournalVersion,
    KeyFileError,
    LogUnavailable,
    MessageTooLarge,
    NodeClosed,
    NoSpace,
    NotDurable,
    ParseError,
    SetupError,
    SubscriptionTaken,
    TopicError,
    UnsupportedValue,
    WaitTimeout,
    WhereError,
    ZmqbusError,
)
from zmqbus.net.keys import BusKey

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
    (["sub", "a", "--durable", ""], 2, "1 to 255 bytes"),
    (["sub", "a", "--durable", "é" * 128], 2, "1 to 255 bytes"),
    (["sub", "a", "--durable", "x", "--history", "5"], 2, "--history is of live messages; with --durable"),
    (["sub", "a", "--start", "first", "--history", "5"], 2, "--history is of live messages; with --start"),
    (["sub", "a", "--start", "whenever"], 2, "first, last, an offset, or a time: 'whenever' is not a time"),
    (["sub", "a", "--start", "1h"], 2, "for that long ago write a minus before it"),
    (["sub", "a", "--start", ""], 2, "an offset, or a time"),
    (["sub", "a", "--start", "9" * 30], 2, "no journal gets that far"),
    (["tap", "--since", "whenever"], 2, "'whenever' is not a time"),
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


def test_bad_lines_are_named_and_the_others_are_published() -> None:
    code, out, err = run("pub", "t", "--json", "--wait-subscribers", "0", text='{"a": 1}\n\nnonsense\n')
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "zmqbus: published 1 message on t to 0 subscribers"
    assert "(line 3 of standard input)" in err.splitlines()[1]


def test_a_line_that_no_message_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "MESSAGE_BYTES_MAX", 100_000)
    code, out, err = run("pub", "t", "--wait-subscribers", "0", text=b"short\n" + b"x" * 300_000 + b"\n")
    assert (code, out) == (2, "")
    published, too_long = err.splitlines()
    assert published == "zmqbus: published 1 message on t to 0 subscribers"
    assert too_long.endswith(
        "xxx' is not a message: line 2 of standard input is longer than a message may be (100,000 bytes); split it"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_come_out_whole_however_they_come_in(size: int) -> None:
    text = b"one\n\ntwo\r\nthree\r\n\nlast"
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(lines(blocks)) == [b"one", b"", b"two", b"three", b"", b"last"]
    assert list(lines([])) == []


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
        (JournalCorrupt("x", 1, "y"), 65),
        (JournalUnavailable("x", "y"), 66),
        (JournalVersion("x", 2, 1), 66),
        (JournalFailed("write", "x", 5, "y"), 74),
        (NoSpace("x", "y"), 74),
        (JournalLocked("x", 1), 75),
        (SetupError("x"), 1),
        (NodeClosed("x"), 1),
        (NotDurable(2, "x"), 3),
        (SubscriptionTaken("x"), 5),
        (LogUnavailable("store", "corrupt", "x"), 65),
        (LogUnavailable("store", "read", "x"), 1),
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


# --- keys, and the other global options ----------------------------------------------------------


def new_key(path: Path) -> str:
    BusKey.generate().save(path)
    return str(path)


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
        _, out, _ = run(*options, "nodes", "--json", "--wait", "1s", others=1)
        assert [json.loads(line)["name"] for line in out.splitlines()] == ["member"]
        assert run("nodes", "--json", "--wait", "300ms")[1] == ""  # without it


@pytest.mark.parametrize(
    "args",
    [
        ("nodes",),
        ("topics",),
        ("pub", "t", "x"),
        ("pub", "t", "x", "--wait-subscribers", "1", "--timeout", "2s"),
        ("sub", "t", "--for", "2s"),
        ("tap", "--for", "2s", "-n", "1"),
    ],
    ids=" ".join,
)
def test_a_key_that_does_not_fit_is_the_last_word(args: tuple[str, ...], tmp_path: Path, bus: str) -> None:
    ours, theirs = new_key(tmp_path / "ours"), new_key(tmp_path / "theirs")
    with zmqbus.Node("member", bus=bus, key=theirs, interface="127.0.0.1") as node:
        peer = node.endpoints["inbox"]
        code, out, err = run("--key-file", ours, "--interface", "127.0.0.1", "--peer", peer, *args)
    assert (code, out) == (77, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"zmqbus: nobody was reached: cannot join {peer} on bus {bus!r}: it")
    assert "no other node" not in err
    assert "nobody was subscribed" not in err


def test_one_who_refuses_us_matters_not_where_others_are(tmp_path: Path, bus: str) -> None:
    ours, theirs = new_key(tmp_path / "ours"), new_key(tmp_path / "theirs")
    with (
        zmqbus.Node("member", bus=bus, key=theirs, interface="127.0.0.1") as stranger,
        zmqbus.Node("member", bus=bus, key=ours, interface="127.0.0.1"),
    ):
        options = ["--key-file", ours, "--interface", "127.0.0.1", "--peer", stranger.endpoints["inbox"]]
        code, out, _ = run(*options, "nodes", "--json", others=1)
    assert code == 0
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["member"]


def test_the_environment_is_as_good_as_options(tmp_path: Path, bus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The member does not announce itself: only whoever knows the bus, the key and its inbox finds it."""
    key = new_key(tmp_path / "bus.key")
    monkeypatch.setenv("ZMQBUS_INTERFACE", "127.0.0.1")
    monkeypatch.setenv("ZMQBUS_KEY_FILE", key)
    with (
        zmqbus.Node("one", bus=bus, key=key, interface="127.0.0.1", discovery="static") as one,
        zmqbus.Node("two", bus=bus, key=key, interface="127.0.0.1", discovery="static") as two,
    ):
        look = ("nodes", "--json", "--wait", "1s")
        assert run(*look)[1] == ""
        monkeypatch.setenv("ZMQBUS_PEER", f"{one.endpoints['inbox']} {two.endpoints['inbox']}")
        code, out, _ = run(*look, others=2)
        assert code == 0
        assert [json.loads(line)["name"] for line in out.splitlines()] == ["one", "two"]
        monkeypatch.setenv("ZMQBUS_BUS", f"test-{secrets.token_hex(6)}")
        assert run(*look)[1] == ""
        code, out, _ = run("--bus", bus, *look, others=2)  # an option goes before
        assert len(out.splitlines()) == 2
        monkeypatch.delenv("ZMQBUS_KEY_FILE")
        assert run("--bus", bus, *look)[1] == ""
        monkeypatch.setenv("ZMQBUS_INTERFACE", "nonsense0")
        code, _, err = run("--bus", bus, *look)
        assert code == 1
        assert "nonsense0" in err
        monkeypatch.setenv("ZMQBUS_KEY_FILE", str(tmp_path / "nowhere"))
        code, _, err = run("--bus", bus, *look)
        assert code == 77
        assert "not found" in err
