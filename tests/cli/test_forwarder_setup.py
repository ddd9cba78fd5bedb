"""How a forwarder is set up: its config file, the systemd unit, and that the page about all that tells the truth."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tests.cli.commands import PATIENCE, finish, run
from tests.cli.test_forwarder import begin, end
from zmqbus.cli import shell
from zmqbus.cli.forwarder import running
from zmqbus.cli.forwarder.settings import KEYS, load
from zmqbus.cli.forwarder.systemd import Notifier
from zmqbus.cli.group import cli
from zmqbus.forwarder import Forwarder
from zmqbus.net.keys import BusKey

Start = Callable[..., subprocess.Popen[str]]
PAGE = (Path(__file__).parents[2] / "docs" / "forwarder.md").read_text()
FENCES = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def block(name: str) -> str:
    [found] = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Forwarder]:
    """The forwarders that would be run."""
    forwarders: list[Forwarder] = []
    monkeypatch.setattr(running, "run", lambda forwarder, bus: forwarders.append(forwarder))
    return forwarders


# --- the config file ---------------------------------------------------------------------------

MISTAKES = [
    ('max_bytes = "1G"', "there is no setting 'max_bytes'; did you mean 'max-bytes'?"),
    ('jurnal = "x"', "there is no setting 'jurnal'; did you mean 'journal'?"),
    ("[forwarder]\nname = 'x'", "there is no setting 'forwarder'; there are: journal, topics, "),
    ("retention-policy-of-mine = 3", "there is no setting 'retention-policy-of-mine'; there are: "),
    ("topics = 3", "topics = 3: write a text, or a list of texts"),
    ('topics = ["a", 3]', "topics = ['a', 3]: write a text, or a list of texts"),
    ('topics = ["a", ["b"]]', "write a text, or a list of texts"),
    ('topics = ["a..b"]', "topics: bad topic 'a..b': "),
    ("topics = []", "topics is empty: write a text, or a list of texts, or leave it out"),
    ('journal = ""', "journal is empty: write a text, or leave it out"),
    ('journal = ["a"]', "journal = ['a']: write a text"),
    ('max-bytes = "lots"', "max-bytes: 'lots' is not a size"),
    ("max-bytes = 1.5", "max-bytes = 1.5: write a size such as"),
    ("max-bytes = true", "max-bytes = True: write a size such as"),
    ("max-bytes = 4096", "max-bytes: 4096 is too small: 1 MiB is the least"),
    ('max-age = "a week"', "max-age: 'a week' is not a duration"),
    ("max-bytes = -1", "max-bytes: '-1' is not a size"),
    ("max-bytes = 99999999999999999999", "max-bytes: '99999999999999999999' is not a size"),
    ("max-age = 0", "max-age: 0 is not between 1s and "),
    ("max-age = inf", "max-age: inf is not between 1s and "),
    ("max-age = nan", "max-age: nan is not between 1s and "),
    ('on-full = "maybe"', "on-full: 'maybe' is not one of 'reject', 'drop_oldest'"),
    ("name = 3", "name = 3: write a text"),
    ("journal = ", "it is no TOML: "),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_in_the_config_file_is_named(made: list[Forwarder], tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "forwarder.toml"
    file.write_text(f"{text}\n" if "journal =" in text else f'journal = "j"\n{text}\n')
    if text.startswith("["):
        file.write_text(text)
    code, out, err = run("forwarder", "--config", str(file))
    assert (code, out, made) == (2, "", [])
    assert f"{file}: {words}" in err or (words.startswith("write") and words in err)
    assert len(err.splitlines()) == 1


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        code, out, err = run("forwarder", "--config", str(path))
        assert (code, out) == (74, "")
        assert err.startswith(f"zmqbus: {path}: ")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    code, out, err = run("forwarder", "--config", str(tmp_path / "binary"))
    assert code == 2
    assert "it is no TOML" in err


def test_what_is_given_wins_over_the_config_file(
    made: list[Forwarder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "forwarder.toml"
    file.write_text(
        'journal = "here/j"\ntopics = "a.> b"\nmax-bytes = 2097152\nmax-age = 90\non-full = "drop_oldest"\n'
        'name = "of file"\nbus = "of-file"\npeer = ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"]\n'
    )
    monkeypatch.delenv("ZMQBUS_BUS")
    assert run("forwarder", "--config", str(file)) == (0, "", "")
    assert run("forwarder", "--config", str(file), "--topics", "c", "--max-bytes", "3M", "--name", "mine")[0] == 0
    assert (
        run("--bus", "given", "--peer", "tcp://127.0.0.1:3", "forwarder", "--config", str(file), "--journal", "k")[0]
        == 0
    )
    monkeypatch.setenv("ZMQBUS_BUS", "of-environment")
    assert run("forwarder", "--config", str(file), "--on-full", "reject", "--max-age", "2h")[0] == 0
    facts = [
        (f.path, f.topics, f._retention, f._config.name, f._config.bus, [int(p[-1]) for p in f._config.peers])
        for f in made
    ]
    here, day = str(tmp_path / "here" / "j"), 90 * 10**9
    assert facts == [
        (here, ["a.>", "b"], (2 << 20, day, True), "of file", "of-file", [1, 2]),
        (here, ["c"], (3 << 20, day, True), "mine", "of-file", [1, 2]),
        (os.path.abspath("k"), ["a.>", "b"], (2 << 20, day, True), "of file", "given", [3]),
        (here, ["a.>", "b"], (2 << 20, 7200 * 10**9, False), "of file", "of-environment", [1, 2]),
    ]


def test_a_config_file_in_use(start: Start, bus: str, tmp_path: Path) -> None:
    """Also by those who ask, for the bus and its key."""
    BusKey.generate().save(tmp_path / "bus.key")
    file = tmp_path / "forwarder.toml"
    file.write_text(
        f'journal = "j"\ntopics = ["logs.>"]\nname = "n"\n'
        f'bus = "{bus}"\nkey-file = "bus.key"\ninterface = "127.0.0.1"\n'
    )
    clean = {name: value for name, value in os.environ.items() if name != "ZMQBUS_BUS"}
    one, line = begin(start, "--config", str(file), env=clean)
    assert f"forwarder n on bus '{bus}' claims logs.>; journal {tmp_path}/j: new" in line
    code, out, err = run("--bus", bus, "forwarder", "--config", str(file), "status", "--json", "--wait", "1s", others=1)
    assert (code, err) == (0, "")
    assert '"name":"n"' in out
    assert end(one)[0] == 0


def test_options_have_their_place(made: list[Forwarder]) -> None:
    for args, words in (
        (["--journal", "x", "--topics", "a", "b"], "'b' has no place here; several patterns are one text"),
        (["--journal", "x", "status"], "--journal is for running a forwarder, not for status"),
        (["--max-bytes", "1G", "forget", "x"], "--max-bytes is for running a forwarder, not for forget"),
        (["--topics", ""], "empty"),
        (["--topics", "a..b"], "empty"),
        (["--max-bytes", "9"], "1 MiB is the least"),
        (["--max-age", "1ms"], "is not between 1s"),
        (["--on-full", "x"], "'reject', 'drop_oldest'"),
        ([], "--journal DIR"),
        (["nonsense"], "No such command"),
        (["forget"], "CURSOR"),
        (["--journal", "x", *(f"--topics=t.{i}" for i in range(129))], "1 to 128 patterns"),
    ):
        code, out, err = run("forwarder", *args)
        assert (code, out, made) == (2, "", []), args
        assert words in err
        assert len(err.splitlines()) == 1


def test_completion(start: Start) -> None:
    def completed(*words: str) -> set[str]:
        variables = {
            "_ZMQBUS_COMPLETE": "bash_complete",
            "COMP_CWORD": str(len(words)),
            "COMP_WORDS": shlex.join(("zmqbus", *words)),
        }
        code, out, err = finish(start(env=os.environ | variables))
        assert (code, err) == (0, "")
        return set(out.split())

    assert completed("forwarder", "") == {"plain,status", "plain,forget"}
    assert completed("forwarder", "--journal", "x", "--on-full", "") == {"plain,reject", "plain,drop_oldest"}
    assert completed("forwarder", "--journal", "") == {"dir,"}
    assert completed("forwarder", "--config", "") == {"file,"}
    assert completed("forwarder", "--topics", "a", "b", "") == {"plain,status", "plain,forget"}
    assert {"plain,--json", "plain,--wait"} <= completed("forwarder", "--status", "--")


# --- the page ----------------------------------------------------------------------------------


def test_the_config_of_the_page_is_taken(
    made: list[Forwarder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZMQBUS_BUS")
    BusKey.generate().save(tmp_path / "bus.key")
    file = tmp_path / "forwarder.toml"
    file.write_text(block("config"))
    assert run("forwarder", "--config", str(file)) == (0, "", "")
    [forwarder] = made
    assert (forwarder.name, forwarder.path, forwarder.topics) == (
        "forwarder-a",
        "/var/lib/zmqbus",
        ["logs.>", "orders.>"],
    )
    assert forwarder._retention == (10 << 30, 7 * 86400 * 10**9, False)
    file.write_text(re.sub(r"^# ", "", block("config"), flags=re.MULTILINE))
    assert load(str(file)).keys() == KEYS.keys()  # it shows all there are, some of them as comments


def test_the_config_file_has_the_options_and_no_others() -> None:
    group = cli.commands["forwarder"]
    own = {option.opts[0] for option in group.params} - {"--config", "--status"}
    of_all = {option.opts[0] for option in cli.params} - {"--version"}
    assert {f"--{key}" for key in KEYS} == own | of_all


def named(text: str) -> list[str]:
    return re.findall(r"(?<!\S)--[a-z-]+", text)


def check_command(words: list[str]) -> None:
    """Whether there is such a command, with such options."""
    command: click.Command = cli
    options: set[str] = set()
    for word in words:
        options |= {name for option in command.params for name in option.opts}
        if isinstance(command, click.Group) and not word.startswith("-"):
            command = command.commands.get(word, command)
    options |= {name for option in command.params for name in option.opts}
    assert command is not cli, words
    assert not isinstance(command, click.Group) or command.invoke_without_command, words
    assert set(named(" ".join(words))) <= options, words


def test_the_commands_of_the_page_exist() -> None:
    lines = [line for fence in FENCES for line in fence.splitlines()] + re.findall(r"`(zmqbus [^`]+)`", PAGE)
    found = [line.split("#")[0].split("|")[0] for line in lines if line.startswith("zmqbus ")]
    assert len(found) > 8
    for line in found:
        check_command(shlex.split(line)[1:])
    with pytest.raises(AssertionError):
        check_command(["forwarder", "status", "--nope"])
    with pytest.raises(AssertionError):
        check_command(["journal", "nope"])


def test_the_unit_of_the_page(tmp_path: Path) -> None:
    unit = block("unit")
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    program, *args = shlex.split(settings["ExecStart"])
    assert program.endswith("/zmqbus")
    check_command(args)
    assert settings["Type"] == "notify"
    assert f"/var/lib/{settings['StateDirectory']}" == tomllib.loads(block("config"))["journal"]
    kept_down = {int(code) for code in settings["RestartPreventExitStatus"].split()}
    assert kept_down == {shell.USAGE, shell.DATA_ERROR, shell.NO_INPUT, shell.NO_PERMISSION}
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("there is no systemd-analyze to look at the unit")
    file = tmp_path / "zmqbus-forwarder.service"
    file.write_text(unit.replace(program, sys.executable))
    done = subprocess.run([analyze, "verify", str(file)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, str(file) in done.stderr) == (0, False), done.stderr


# --- systemd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told(start: Start, bus: str, tmp_path: Path, kind: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = str(tmp_path / "notify") if kind == "path" else f"@{bus}"
        manager.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
        manager.settimeout(PATIENCE)
        told: list[str] = []

        def until(word: str, times: int = 1) -> None:
            while sum(word in text.split("\n") for text in told) < times:
                told.append(manager.recv(65536).decode())

        environment = os.environ | {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "900000"}
        one, _ = begin(start, "--journal", str(tmp_path / "j"), env=environment)
        until("READY=1")
        assert told[0] == "STATUS=recovering the journal"
        ready = told[-1].split("\n")
        assert ready[1].startswith("STATUS=0/s, 0 B/s in; next offset 0, 64 MiB in 1 segment; ")
        begun = time.monotonic()
        until("WATCHDOG=1", 5)
        assert time.monotonic() - begun < 5 * 0.9
        one.terminate()
        until("STOPPING=1")
        assert finish(one)[0] == 0


def test_a_watchdog_of_another_process(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        environment = os.environ | {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "1000",
            "WATCHDOG_PID": "1",
        }
        one, _ = begin(start, "--journal", str(tmp_path / "j"), env=environment)
        assert end(one)[0] == 0
        manager.setblocking(False)
        told = []
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(manager.recv(65536).decode())
    assert told[-1].startswith("STOPPING=1\n")
    assert not any("WATCHDOG" in text for text in told)


def test_nobody_to_notify(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:1:2"}, {"WATCHDOG_USEC": "1000"}):
        notifier = Notifier(environment)
        assert notifier.watchdog is None
        notifier.tell("READY=1")
        notifier.close()
    gone = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "nonsense"})
    assert gone.watchdog is None
    gone.tell("READY=1")
    gone.close()
