"""Topics: the grammar as a table, and matching against a reference too simple to be wrong."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqbus.errors import TopicError
from zmqbus.protocol import topics
from zmqbus.protocol.topics import (
    TOPIC_BYTES_MAX,
    Matcher,
    PatternSet,
    check_pattern,
    covering_prefixes,
    encode_topic,
    subscription_prefix,
)

# --- grammar -----------------------------------------------------------------------------------

GOOD_TOPICS = ["a", "logs.web1.nginx", "größe.温度.🌡", "a-b_c/d:e", "0.1.2", "a$.b$c", "x" * 255, "ü" * 127]
BAD_TOPICS = {
    "": "empty",
    ".": "token 1 is empty",
    ".a": "token 1 is empty",
    "a.": "token 2 is empty",
    "a..b": "token 2 is empty",
    "a b": r"index 1 \(U\+0020\) is white space",
    "a.b\n": r"index 3 \(U\+000A\)",
    "a\0": r"index 1 \(U\+0000\)",
    "a.\x7f": r"index 2 \(U\+007F\)",
    "a\u2003b": r"index 1 \(U\+2003\)",
    "ab\ud800": r"index 2 \(U\+D800\) is half a surrogate pair",
    "$SYS.x": r"token 1 '\$SYS' starts with '\$'",
    "a.$x": r"token 2 '\$x' starts with '\$'",
    "x" * 256: "256 bytes of UTF-8; the limit is 255",
    "ü" * 128: "256 bytes of UTF-8; the limit is 255",
}
BAD_AS_TOPIC_ONLY = {
    "*": "token 1 .* wildcard",
    ">": "token 1 .* wildcard",
    "logs.*.x": r"token 2 '\*' has a wildcard",
    "logs.>": "token 2 '>' has a wildcard",
}
BAD_AS_EITHER = {
    "a.web*": r"token 2 'web\*'",
    "a.**": r"token 2 '\*\*'",
    "a>.b": "token 1 'a>'",
    "a.>>": "token 2 '>>'",
}


@pytest.mark.parametrize("topic", GOOD_TOPICS)
def test_good_topics_encode_to_their_utf8_and_are_patterns_too(topic: str) -> None:
    assert encode_topic(topic) == topic.encode()
    check_pattern(topic)


@pytest.mark.parametrize(("topic", "reason"), (BAD_TOPICS | BAD_AS_TOPIC_ONLY | BAD_AS_EITHER).items())
def test_bad_topics_are_refused_with_rule_and_place(topic: str, reason: str) -> None:
    with pytest.raises(TopicError, match=reason) as caught:
        encode_topic(topic)
    assert caught.value.topic == topic


@pytest.mark.parametrize("pattern", [*GOOD_TOPICS, "*", ">", "*.>", "a.*", "*.a", "a.*.b.*", "logs.>", "*.*.*"])
def test_good_patterns_pass(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    (BAD_TOPICS | BAD_AS_EITHER | {">.a": "token 1 is '>', which may only come last", "a.>.>": "token 2"}).items(),
)
def test_bad_patterns_are_refused_with_rule_and_place(pattern: str, reason: str) -> None:
    with pytest.raises(TopicError, match=reason):
        check_pattern(pattern)


@pytest.mark.parametrize("thing", [None, 7, b"logs", ["logs"]])
def test_what_is_not_str_is_refused(thing: Any) -> None:
    for check in (encode_topic, check_pattern):
        with pytest.raises(TopicError, match=f"must be str, not {type(thing).__name__}"):
            check(thing)


@pytest.mark.parametrize("reserved", ["$dead.orders.new", "$beat", "a.$x"])
def test_reserved_tokens_pass_internally_only(reserved: str) -> None:
    assert encode_topic(reserved, internal=True) == reserved.encode()
    check_pattern(reserved, internal=True)
    check_pattern(f"{reserved}.>", internal=True)
    with pytest.raises(TopicError, match="reserved for zmqbus"):
        check_pattern(f"{reserved}.>")


def test_forbidden_characters_are_exactly_white_space_controls_and_surrogates() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        forbidden = char.isspace() or unicodedata.category(char) in ("Cc", "Cs")
        assert bool(topics._FORBIDDEN.search(char)) == forbidden, f"U+{code:04X}"


@given(st.text(max_size=300))
def test_any_text_either_encodes_to_its_utf8_or_raises_topic_error(text: str) -> None:
    try:
        encoded = encode_topic(text)
    except TopicError:
        return
    assert encoded.decode() == text
    assert 0 < len(encoded) <= TOPIC_BYTES_MAX
    assert b"\0" not in encoded
    check_pattern(text)  # every topic can be subscribed to
    assert Matcher([text]).matches(text)


# --- matching ----------------------------------------------------------------------------------


def reference_match(pattern: list[str], topic: list[str], first: bool = True) -> bool:
    """The rules, one a line."""
    if not pattern or not topic:
        return pattern == topic
    if first and topic[0].startswith("$") and pattern[0] in ("*", ">"):
        return False
    if pattern[0] == ">":
        return True
    if pattern[0] in ("*", topic[0]):
        return reference_match(pattern[1:], topic[1:], False)
    return False


MATCHES = [
    ("logs.web1", "logs.web1", True),
    ("logs.web1", "logs.web10", False),
    ("logs.web1", "logs", False),
    ("logs.web1", "logs.web1.nginx", False),
    ("logs.web1", "LOGS.web1", False),
    ("logs.*", "logs.web1", True),
    ("logs.*", "logs", False),
    ("logs.*", "logs.web1.nginx", False),
    ("*.web1", "logs.web1", True),
    ("logs.>", "logs.web1", True),
    ("logs.>", "logs.web1.nginx", True),
    ("logs.>", "logs", False),
    ("logs.>", "logsx.web1", False),
    ("*.>", "logs", False),
    ("*.>", "logs.web1", True),
    (">", "logs", True),
    (">", "logs.web1.nginx", True),
    (">", "$dead.orders", False),
    ("*", "$beat", False),
    ("*.orders", "$dead.orders", False),
    ("$dead.>", "$dead.orders", True),
    ("$dead.*", "$dead.orders", True),
    ("logs.*", "logs.$x", True),
    ("a.*", "a.b+", True),
    ("a.b+", "a.bb", False),
    ("a.[bc]", "a.b", False),
]


@pytest.mark.parametrize(("pattern", "topic", "expected"), MATCHES)
def test_matching_table(pattern: str, topic: str, expected: bool) -> None:
    assert reference_match(pattern.split("."), topic.split(".")) is expected
    assert Matcher([pattern]).matches(topic) is expected
    assert PatternSet([(pattern, 7)]).match(topic) == ([7] if expected else [])


# A small alphabet, so that patterns and topics meet; tokens that look like regular expressions or share prefixes.
TOKENS = st.sampled_from(["a", "b", "ab", "a+", "(", "ü", "$d", "\\", "|"])
TOPICS = st.lists(TOKENS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.builds(
    lambda tokens, rest: ".".join([*tokens, *rest]),
    st.lists(TOKENS | st.just("*"), min_size=1, max_size=4),
    st.sampled_from([[], [">"]]),
) | st.just(">")
ENTRIES = st.lists(st.tuples(PATTERNS, st.integers(0, 5)), max_size=12)


@given(ENTRIES, st.lists(TOPICS, min_size=1, max_size=8))
def test_pattern_set_and_matcher_agree_with_the_reference(entries: list[tuple[str, int]], asked: list[str]) -> None:
    patterns = PatternSet(entries)
    matcher = Matcher(pattern for pattern, _ in entries)
    for topic in asked:
        expected = {value for pattern, value in entries if reference_match(pattern.split("."), topic.split("."))}
        found = patterns.match(topic)
        assert sorted(found) == sorted(expected)
        assert matcher.matches(topic) is bool(expected)


@given(ENTRIES, st.data())
def test_pattern_set_discards_what_was_added_and_keeps_no_empty_branch(
    entries: list[tuple[str, int]], data: st.DataObject
) -> None:
    patterns = PatternSet(entries)
    left = set(entries)
    assert len(patterns) == len(left)
    for entry in data.draw(st.permutations(sorted({*entries, ("never.added", 1), ("a.*.never", 1)}))):
        patterns.discard(*entry)
        left.discard(entry)
        assert len(patterns) == len(left)
        topic = data.draw(TOPICS)
        expected = {value for pattern, value in left if reference_match(pattern.split("."), topic.split("."))}
        assert sorted(patterns.match(topic)) == sorted(expected)
    assert patterns._root.is_bare()


def test_one_value_under_many_patterns_is_matched_once() -> None:
    patterns = PatternSet([("a.b", "v"), ("a.*", "v"), (">", "v"), ("a.b", "v"), ("a.b", "w")])
    assert len(patterns) == 4
    assert sorted(patterns.match("a.b")) == ["v", "w"]


def test_bad_patterns_are_refused_before_anything_changes() -> None:
    patterns: PatternSet[int] = PatternSet()
    with pytest.raises(TopicError):
        patterns.add("a..b", 1)
    assert len(patterns) == 0
    assert patterns._root.is_bare()
    with pytest.raises(TopicError):
        Matcher(["a", "b*"])


def test_a_matcher_of_nothing_matches_nothing() -> None:
    assert not Matcher([]).matches("a")


def test_a_hostile_topic_costs_no_more_than_the_trie_has_branches() -> None:
    """`*` as a *topic* token must not be found twice per level: that would double the work 127 times."""
    stars = ".".join(["*"] * 128)
    patterns = PatternSet([(stars, 1), (".".join(["*"] * 127), 2)])
    assert patterns.match(stars) == [1]


# --- prefixes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("logs.web1", b"logs.web1\0"),
        ("logs.*", b"logs."),
        ("logs.>", b"logs."),
        ("logs.*.nginx", b"logs."),
        ("logs.web1.*.x.>", b"logs.web1."),
        ("*", b""),
        (">", b""),
        ("*.web1", b""),
        ("größe.>", "größe.".encode()),
    ],
)
def test_subscription_prefixes(pattern: str, prefix: bytes) -> None:
    assert subscription_prefix(pattern) == prefix


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [
        ([], []),
        (["a.b", "a.b"], [b"a.b\0"]),
        (["a.b", "a.*", "a.b.>"], [b"a."]),
        (["a.b", "a.bc", "a.b.c"], [b"a.b\0", b"a.b.c\0", b"a.bc\0"]),
        (["a.b", "z.>", ">"], [b""]),
        (["b.>", "a.x.>", "a.>"], [b"a.", b"b."]),
    ],
)
def test_covering_prefixes(patterns: list[str], prefixes: list[bytes]) -> None:
    assert covering_prefixes(patterns) == prefixes


@given(st.lists(PATTERNS, max_size=8), TOPICS)
def test_no_prefix_keeps_out_a_frame_that_matches(patterns: list[str], topic: str) -> None:
    frame = topic.encode() + b"\0" + b"header and payload"
    covering = covering_prefixes(patterns)
    for pattern in patterns:
        if reference_match(pattern.split("."), topic.split(".")):
            assert frame.startswith(subscription_prefix(pattern))
            assert any(frame.startswith(prefix) for prefix in covering)


@given(st.lists(PATTERNS, max_size=8))
def test_covering_prefixes_are_minimal_and_let_nothing_else_in(patterns: list[str]) -> None:
    wanted = {subscription_prefix(pattern) for pattern in patterns}
    covering = covering_prefixes(patterns)
    assert set(covering) <= wanted
    assert all(any(prefix.startswith(kept) for kept in covering) for prefix in wanted)
    for kept in covering:  # taking any one away would leave its own pattern unserved
        assert not any(kept.startswith(other) for other in covering if other is not kept)
