"""docs/protocol.md says what the code does: every vector, command, field, bound, flag, error code and number in it.

The page is where the vectors are kept; here they are read from it, made by the code, and compared.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.inspect import (
    BoolType,
    BytesType,
    DictType,
    Field,
    FloatType,
    IntType,
    ListType,
    StrType,
    StructType,
    TupleType,
    UnionType,
)

from zmqbus.errors import TopicError
from zmqbus.net import discovery, mdns
from zmqbus.net.keys import BusKey
from zmqbus.protocol import commands, frames
from zmqbus.protocol.commands import BODIES, ENVELOPE, Body, Command, decode_command, encode_command
from zmqbus.protocol.frames import (
    ASKS,
    BALLAST,
    DATA,
    EXTERNAL,
    HEAD,
    HEADERS,
    HEARTBEAT,
    QUEUED,
    RAW,
    ValueDecoder,
    encode_frame,
)
from zmqbus.protocol.members.membership import Membership
from zmqbus.protocol.topics import encode_topic, subscription_prefix

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "protocol.md").read_text()
ORIGIN = 0x1122334455667788
JOURNAL = 0x0A0B0C0D0E0F1011
TIME = 1_700_000_000_000_000_000


def vectors() -> dict[str, list[bytes]]:
    """```hex NAME blocks: hex digits, `#` and a comment; `# part n` begins a part."""
    found = {}
    for name, block in re.findall(r"^```hex (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        parts = [""]
        for line in block.splitlines():
            if re.match(r"# part [1-9]", line):
                parts.append("")
            parts[-1] += line.partition("#")[0]
        found[name] = [bytes.fromhex(part) for part in parts]
    return found


def section(heading: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    match = re.search(rf"^(#+) {re.escape(heading)}$", PAGE, re.MULTILINE)
    assert match, f"no section {heading!r}"
    rest = PAGE[match.end() :]
    following = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: following.start()] if following else rest


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose head begins with the cell `first`."""
    table = re.search(rf"^\| {re.escape(first)} \|.*\n\| ---.*\n((?:\|.*\n)*)", text, re.MULTILINE)
    assert table, f"no table of {first!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


VECTORS = vectors()

# --- PUB frames --------------------------------------------------------------------------------


def frame(topic: bytes, flags: int, count: int, first: int, payload: bytes, kind: int = DATA) -> bytes:
    return encode_frame(topic + b"\0", kind, flags, count, ORIGIN, first, TIME, payload)


def packed(*values: Any) -> bytes:
    return frames.encode_values(list(values))


FRAMES: dict[str, tuple[list[bytes], Any]] = {
    "data": ([frame(b"logs.web1", 0, 1, 5, packed("hi"))], (["hi"], None)),
    "data-batch": ([frame(b"a", 0, 3, 1, packed(1, b"\xff", None))], ([1, b"\xff", None], None)),
    "data-headers": (
        [frame(b"a", HEADERS, 2, 1, packed(["x", "y"], [None, {"k": "v"}]))],
        (["x", "y"], [None, {"k": "v"}]),
    ),
    "data-external": ([frame(b"a", EXTERNAL, 1, 7, b""), packed("big")], (["big"], None)),
    "data-external-raw": ([frame(b"a", EXTERNAL | RAW, 1, 8, b""), b"\x00\x01\x02"], ([b"\x00\x01\x02"], None)),
    "head": ([frame(b"a", 0, 0, 9, b"", HEAD)], None),
    "head-asks": ([frame(b"a", ASKS, 0, 9, b"", HEAD)], None),
    "heartbeat": ([frame(b"$hb", 0, 0, 42, b"", HEARTBEAT)], None),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_on_the_page_are_what_is_sent(name: str) -> None:
    parts, values = FRAMES[name]
    assert VECTORS[name] == parts
    if values is not None:
        (batch,) = frames.decode_batches(VECTORS[name])
        assert ValueDecoder().decode(batch) == values


def test_kinds_and_flags() -> None:
    text = section("PUB frames")
    kinds = {row[1].strip("`"): int(row[0]) for row in rows(text, "kind")}
    assert kinds == {"DATA": DATA, "HEAD": HEAD, "HEARTBEAT": HEARTBEAT, "BALLAST": BALLAST}
    described = {int(row[0]): row[1] for row in rows(text, "flags")}
    assert described == {
        0: "",
        HEADERS: "`HEADERS`",
        EXTERNAL: "`EXTERNAL`",
        EXTERNAL | HEADERS: "`EXTERNAL` and `HEADERS`",
        EXTERNAL | RAW: f"`EXTERNAL` and `RAW` ({RAW})",
    }
    assert f"of HEAD: {ASKS} is `ASKS`" in text
    assert f"Beside any of these, {QUEUED} is `QUEUED`" in text
    drawn = re.search(r"version +kind +flags +count +origin +first seq +time_ns .*\n.*?((?:u\d+ +){7})", text)
    assert drawn
    sizes = [int(size) // 8 for size in re.findall(r"u(\d+)", drawn[1])]
    assert sizes == [len(frames.HEADER.pack(*[0] * 7)[at:to]) for at, to in FIELDS]
    assert [row[0] for row in rows(text, "header field")] == [
        *("version", "kind", "flags", "count", "origin", "first seq", "time_ns")
    ]


FIELDS = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 24), (24, 32)]


# --- commands ----------------------------------------------------------------------------------

INTRODUCTION: dict[str, Any] = {
    "origin": ORIGIN,
    "bus": "default",
    "epoch": TIME,
    "pub_port": 5001,
    "host": "h",
    "release": "0.1",
}
COMMANDS: dict[str, tuple[Body, int]] = {
    "hello": (
        commands.Hello(
            name="c1",
            inbox=["tcp://10.0.0.7:5000"],
            pid=99,
            subscriptions=[commands.Subscribed(1, ["logs.>"])],
            peers=[(9, "tcp://10.0.0.8:6000")],
            **INTRODUCTION,
        ),
        1,
    ),
    "welcome": (commands.Welcome(name="c2", inbox=["tcp://10.0.0.9:5000"], pid=98, **INTRODUCTION), 1),
    "bye": (commands.Bye(), 6),
    "subscribe": (commands.Subscribe(2, ["a.*", "b.>"]), 2),
    "unsubscribe": (commands.Unsubscribe(2), 0),
    "heads": (commands.Heads(1, [(b"logs.web1", 6), (b"logs.web2", 1)], True), 2),
    "fetch": (commands.Fetch(b"logs.web1", ORIGIN, 3, 5, 65536), 3),
    "batches": (commands.Batches(b"logs.web1", ORIGIN, 3, 5), 3),
    "ack": (commands.Ack(JOURNAL, ORIGIN, [(b"logs.web1", 6), (b"logs.web2", 1)]), 0),
    "read": (commands.Read(1, ["logs.>"], 4 * 1024 * 1024, "indexer", offset=0), 7),
    "log": (commands.Log(1, JOURNAL, 42, 50, [(40, 46, 0), (41, 34, 3)], [(37, 39)]), 7),
    "credit": (commands.Credit(1, 1024 * 1024), 8),
    "commit": (commands.Commit("indexer", 42, 1), 9),
    "unread": (commands.Unread(1), 0),
    "offer": (commands.Offer(0x99AABBCCDDEEFF00, [(b"logs.web1", 6)]), 0),
    "join": (commands.Join(1, ["jobs.*"], "workers", 30_000, 32), 13),
    "job": (commands.Job(1, [(17, 1)]), 13),
    "done": (commands.Done(1, [(17, 5, 5)], 33), 13),
    "settled": (commands.Settled(1, [(16, 1, 2)]), 13),
    "fail": (commands.Fail(1, [(17, 6, 6)], "nack", 1500, "disk full", 34), 13),
    "extend": (commands.Extend(1, 17, 60_000), 13),
    "leave": (commands.Leave(1), 13),
    "stats": (commands.Stats(True, 1000), 4),
    "statistics": (
        commands.Statistics({"peers": 2, "load": 0.5}, [(b"a", 9, 300)], True, [("indexer", 42, True)]),
        4,
    ),
    "request": (commands.Request("images.resize", 5000), 10),
    "reply": (commands.Reply(), 10),
    "reply-error": (commands.Reply("ValueError", "no such image"), 11),
    "serve": (commands.Serve(["images.resize", "time.now"]), 12),
    "error": (commands.Error("origin", "not kept here"), 3),
}
LOGGED = [FRAMES["data"][0], FRAMES["data-external-raw"][0]]
CARRIED = {
    "job": [frame(b"jobs.a", QUEUED, 2, 5, packed("x", "y"))],
    "batches": FRAMES["data"][0],
    "log": [b"".join(part for parts in LOGGED for part in parts)],
    "request": [frames.encode_value({"image": 7}), frames.encode_value({"trace": "x1"})],
    "reply": [frames.encode_value("done")],
}


def test_every_command_has_a_vector_and_every_vector_is_one_of_ours() -> None:
    assert {type(body) for body, _ in COMMANDS.values()} == set(BODIES.values())
    assert set(VECTORS) == set(FRAMES) | set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_the_page_are_what_is_sent(name: str) -> None:
    body, request = COMMANDS[name]
    carried = CARRIED.get(name, [])
    (frame,) = VECTORS[name]
    assert frame == encode_command(body, request, carried)
    assert decode_command(frame) == Command(request, body, carried)


def test_the_log_on_the_page_is_cut_where_it_says() -> None:
    body, _ = COMMANDS["log"]
    assert isinstance(body, commands.Log)
    (rest,) = CARRIED["log"]
    for (_, size, external), parts in zip(body.batches, LOGGED, strict=True):
        cut = [rest[:size], rest[size : size + external]]
        assert cut[: len(parts)] == parts
        rest = rest[size + external :]
    assert not rest


def described(kind: Any) -> str:
    """A field's type and bounds, as the page writes them."""
    match kind:
        case IntType(ge=0, le=None):
            return "uint"
        case IntType(ge=least, le=None):
            return f"{'uint' if least >= 0 else 'int'} ≥ {least}"
        case IntType(ge=least, le=most):
            return f"uint {least} to {most}"
        case StrType() | BytesType():
            name = "str" if isinstance(kind, StrType) else "bin"
            return (
                f"{name} {kind.min_length} to {kind.max_length}" if kind.min_length else f"{name} ≤ {kind.max_length}"
            )
        case BoolType():
            return "bool"
        case ListType():
            return f"array ≤ {kind.max_length} of {described(kind.item_type)}"
        case TupleType():
            return f"[{', '.join(map(described, kind.item_types))}]"
        case StructType():
            return "{" + ", ".join(f"`{field.encode_name}`: {described(field.type)}" for field in kind.fields) + "}"
        case DictType(value_type=UnionType(types=types)) if {*map(type, types)} == {IntType, FloatType, StrType}:
            return "map of str to int, float or str"
    raise AssertionError(f"how does the page write {kind}?")


def default(field: Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        assert field.default_factory() == []
        return "empty"
    return (
        {True: "true", False: "false"}.get(field.default, f'"{field.default}"')
        if isinstance(field.default, bool | str)
        else str(field.default)
    )


@pytest.mark.parametrize("code", sorted(BODIES))
def test_every_field_of_every_command(code: int) -> None:
    cls = BODIES[code]
    table = rows(section(f"{cls.__name__.upper()} — {code}"), "field")
    struct = msgspec.inspect.type_info(cls)
    assert isinstance(struct, StructType)
    assert [row[:3] for row in table] == [
        [f"`{field.encode_name}`", described(field.type), default(field)] for field in struct.fields
    ]


def test_every_command_is_a_section_and_in_the_overview() -> None:
    headings = re.findall(r"^### ([A-Z]+) — (\d+)$", PAGE, re.MULTILINE)
    assert sorted((int(code), name) for name, code in headings) == sorted(
        (code, cls.__name__.upper()) for code, cls in BODIES.items()
    )
    overview = rows(section("Commands"), "asks")
    mentioned = {int(code) for row in overview for code in re.findall(r"\d+", f"{row[1]} {row[3]}")}
    assert mentioned == set(BODIES)


def test_the_envelope() -> None:
    assert ENVELOPE.format == "<BBQII"
    fields = "command u8 | version u8 | request id u64 | number of parts u32 | bytes of the body u32"
    assert f"envelope  {fields}, little endian: {ENVELOPE.size} bytes" in PAGE


def test_every_error_code() -> None:
    sent = set()
    for file in (*(ROOT / "zmqbus" / "node").rglob("*.py"), *(ROOT / "zmqbus" / "forwarder").rglob("*.py")):
        sent |= set(re.findall(r"\bError\(\s*\"([a-z_]+)\"", file.read_text()))
    listed = [row[0].strip("`") for row in rows(section("ERROR — 255"), "code")]
    assert sorted(listed) == sorted(sent)


# --- numbers and names -------------------------------------------------------------------------

MODULES = {
    **dict.fromkeys(("topics", "frames", "commands"), "protocol"),
    **dict.fromkeys(("history", "ring", "tracking"), "protocol.streams"),
    **dict.fromkeys(("membership", "peers"), "protocol.members"),
    "engine": "node",
    **dict.fromkeys(("broadcast", "publisher", "outlet", "durability"), "node.publishing"),
    **dict.fromkeys(("committer", "fetching", "outbox"), "node.storing"),
    **dict.fromkeys(("peering", "registry", "serving"), "node.peers"),
    "answering": "node.work.requests",
    **dict.fromkeys(("desk", "owner"), "node.work.queues"),
    **dict.fromkeys(("discovery", "sockets", "keys"), "net"),
    **dict.fromkeys(("journal", "positions"), "journal"),
    **dict.fromkeys(("inflow", "readings"), "forwarder"),
}
NUMBERS = {row[2].strip("`"): row[0] for row in rows(section("Numbers"), "number")}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number(name: str) -> None:
    module, constant = name.split(".")
    if constant in ("lost_after", "forget_after"):
        value = inspect.signature(Membership).parameters[constant].default
    else:
        value = getattr(importlib.import_module(f"zmqbus.{MODULES[module]}.{module}"), constant)
    assert NUMBERS[name] == str(value)


@pytest.mark.parametrize("module", [frames, commands])
def test_no_constant_of_the_wire_is_missing(module: Any) -> None:
    short = module.__name__.rpartition(".")[2]
    shown_as_kind_or_flag = {"DATA", "HEAD", "HEARTBEAT", "BALLAST", "HEADERS", "EXTERNAL", "RAW", "QUEUED", "ASKS"}
    for name, value in vars(module).items():
        if name.isupper() and not name.startswith("_") and isinstance(value, int) and name not in shown_as_kind_or_flag:
            assert f"{short}.{name}" in NUMBERS or f"frames.{name}" in NUMBERS, name


def test_discovery_records() -> None:
    text = section("Finding each other")
    assert mdns.SERVICE_TYPE in text
    listed = {row[0].strip("`") for row in rows(text, "TXT")}
    sent = set(re.findall(r'^ +b"(\w+)": ', inspect.getsource(discovery.Discovery.__init__), re.MULTILINE))
    assert listed == sent


def test_keys() -> None:
    text = section("Keys")
    block = re.search(r"^```key\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block
    shown = dict(re.split(r"  +", line, maxsplit=1) for line in block[1].splitlines())
    key = BusKey(bytes(range(32)))
    assert shown["server secret"].encode() == key.server.secret
    assert shown["server public"].encode() == key.server.public
    assert shown["client secret"].encode() == key.client.secret
    assert shown["client public"].encode() == key.client.public
    assert shown["fingerprint"] == key.fingerprint
    purposes = [row[0].strip("`") for row in rows(text, "info")]
    source = inspect.getsource(BusKey.__init__)
    assert purposes == re.findall(r'b"([a-z ]+)"', source)


def test_the_key_file_on_the_page(tmp_path: Path) -> None:
    line = re.search(r"^file +(zmqbus-key-1:\S+)$", PAGE, re.MULTILINE)
    assert line
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text(line[1] + "\n")
    assert BusKey.load(file) == BusKey(bytes(range(32)))


# --- topics ------------------------------------------------------------------------------------


def forbidden_characters() -> set[int]:
    """The white space and control characters that the page lists."""
    sentence = re.search(r"No token contains (.*?)\.\n", PAGE, re.DOTALL)
    assert sentence
    found: set[int] = set()
    for low, high in re.findall(r"U\+([0-9A-F]{4})(?:\s+to\s+U\+([0-9A-F]{4}))?", sentence[1]):
        found |= set(range(int(low, 16), int(high or low, 16) + 1))
    return found


def refused(topic: str) -> bool:
    try:
        encode_topic(topic)
    except TopicError:
        return True
    return False


def test_the_characters_that_no_topic_has() -> None:
    listed = forbidden_characters() | set(map(ord, ".*>$"))  # $ only at the beginning of a token, as these are
    assert {code for code in range(0xD800) if refused(chr(code))} == listed


@pytest.mark.parametrize(
    ("pattern", "prefix"), re.findall(r"`([^`]+)` ⟶ (?:`([^`]+)`|the empty)", section("Topics and patterns"))
)
def test_prefixes(pattern: str, prefix: str) -> None:
    decode: Callable[[str], bytes] = bytes.fromhex if " " in prefix else str.encode
    assert subscription_prefix(pattern) == decode(prefix)


def test_the_examples_of_prefixes_are_found() -> None:
    assert len(re.findall(r"` ⟶ ", section("Topics and patterns"))) == 3


# --- links and files ---------------------------------------------------------------------------


def test_links_and_files_exist() -> None:
    slugs = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert anchor in slugs, anchor
    for path in re.findall(r"`(tests/[\w/]+\.\w+)`", PAGE):
        assert (ROOT / path).exists(), path
