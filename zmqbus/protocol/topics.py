"""Topics and patterns: their grammar, what a socket subscribes to for them, and which patterns match a topic.

    topic    =  token *( "." token )                          logs.web1.nginx
    pattern  =  ( token / "*" ) *( "." ( token / "*" ) ) [ "." ">" ]  /  ">"
    token    =  1*( any character except "." "*" ">", white space, control characters and surrogates )

- `*` stands for exactly one token, a final `>` for one or more. Both are whole tokens: `web*` is an error.
- Topics and patterns are at most TOPIC_BYTES_MAX bytes of UTF-8, compared byte by byte: no case folding, no
  Unicode normalisation.
- Tokens that start with `$` belong to zmqbus: they are refused unless the caller says `internal=True`.
- A wildcard in first place does not match a first token that starts with `$`: `>` is all of the users' topics.

On the wire a topic ends in 0x00, which no topic contains; ZeroMQ filters by prefix, the receiver by token.
This module is pure: text in, text or bytes out. It keeps no state but what a PatternSet or Matcher was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

from zmqbus.errors import TopicError

TOPIC_BYTES_MAX = 255  # one length byte in a record header; libzmq also stores one trie node per byte
TOPIC_END = b"\0"  # follows every topic on the wire, so that `sensor.1` is not a prefix of `sensor.10`

# White space (the Unicode property White_Space), control characters (general category Cc), lone surrogates.
# Spelled out, so that clients in other languages and newer Unicode tables agree on it for ever.
_FORBIDDEN = re.compile("[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ud800-\udfff]")

T = TypeVar("T")


# --- grammar -----------------------------------------------------------------------------------


def encode_topic(topic: str, *, internal: bool = False) -> bytes:
    """The UTF-8 of a topic that may be published to (without TOPIC_END).

    `internal=True` admits the reserved tokens. Raises TopicError naming the rule that is broken, and where.
    """
    encoded = _check_text(topic)
    for number, token in enumerate(topic.split("."), 1):
        _check_token(topic, number, token, internal)
        if "*" in token or ">" in token:
            raise TopicError(topic, f"token {number} {token!r} has a wildcard; those are for subscribing only")
    return encoded


def check_pattern(pattern: str, *, internal: bool = False) -> None:
    """Raise TopicError, naming rule and place, unless `pattern` is a topic or pattern to subscribe to.

    `internal=True` admits the reserved tokens.
    """
    _check_text(pattern)
    tokens = pattern.split(".")
    for number, token in enumerate(tokens, 1):
        _check_token(pattern, number, token, internal)
        if token == ">" and number < len(tokens):
            raise TopicError(pattern, f"token {number} is '>', which may only come last; use '*' for one token")
        if len(token) > 1 and ("*" in token or ">" in token):
            raise TopicError(pattern, f"token {number} {token!r}: a wildcard must be a whole token")


def _check_text(text: str) -> bytes:
    """Check what does not depend on tokens; return the UTF-8."""
    if not isinstance(text, str):
        raise TopicError(text, f"must be str, not {type(text).__name__}")
    if not text:
        raise TopicError(text, "is empty")
    if found := _FORBIDDEN.search(text):
        code = ord(found[0])
        kind = "half a surrogate pair" if 0xD800 <= code <= 0xDFFF else "white space or a control character"
        raise TopicError(text, f"the character at index {found.start()} (U+{code:04X}) is {kind}")
    encoded = text.encode()
    if len(encoded) > TOPIC_BYTES_MAX:
        raise TopicError(text, f"is {len(encoded):,} bytes of UTF-8; the limit is {TOPIC_BYTES_MAX}")
    return encoded


def _check_token(text: str, number: int, token: str, internal: bool) -> None:
    if not token:
        raise TopicError(text, f"token {number} is empty (a dot at either end, or two in a row)")
    if token[0] == "$" and not internal:
        raise TopicError(text, f"token {number} {token!r} starts with '$', which is reserved for zmqbus")


# --- what a SUB subscribes to ------------------------------------------------------------------


def subscription_prefix(pattern: str) -> bytes:
    """The ZeroMQ prefix that lets through every PUB frame (`topic 0x00 …`) whose topic matches a valid `pattern`.

    An exact topic: itself and TOPIC_END, so nothing else comes through. A pattern: its bytes up to and
    including the dot before the first wildcard, so more may come through: ask a Matcher on receipt.
    """
    literal: list[str] = []
    for token in pattern.split("."):
        if token in ("*", ">"):
            return "".join(f"{token}." for token in literal).encode()
        literal.append(token)
    return pattern.encode() + TOPIC_END


def covering_prefixes(patterns: Iterable[str]) -> list[bytes]:
    """The fewest ZeroMQ prefixes that serve all of `patterns`, sorted; none of them is a prefix of another.

    Fewer is better than convenient: each is one message to, and one trie entry in, every publisher.
    """
    covering: list[bytes] = []
    for prefix in sorted({subscription_prefix(pattern) for pattern in patterns}):
        # Whatever starts with a kept prefix sorts right behind it, so the last one kept decides.
        if not covering or not prefix.startswith(covering[-1]):
            covering.append(prefix)
    return covering


# --- matching ----------------------------------------------------------------------------------


class _Branch(Generic[T]):
    """One place in the trie: the tokens so far. Wildcards have slots of their own, so no topic, however
    malformed, can reach a branch twice; the work per token is bounded by the patterns that still agree.
    """

    __slots__ = ("here", "literal", "rest", "star")

    def __init__(self) -> None:
        self.literal: dict[str, _Branch[T]] = {}
        self.star: _Branch[T] | None = None
        self.here: dict[T, None] = {}  # values of patterns that end here; a dict keeps their order
        self.rest: dict[T, None] = {}  # values of patterns that go on with `>`

    def is_bare(self) -> bool:
        return not (self.literal or self.star or self.here or self.rest)


class PatternSet(Generic[T]):
    """Many (pattern, value) entries, asked which values match a topic. Values are hashable.

    A trie over tokens: the cost of `match` grows with the topic's tokens, not with the number of entries.
    The grammar of patterns is checked; who may subscribe to reserved tokens is the caller's business.
    Unbounded: whoever adds on behalf of a peer counts its entries (400 bytes a token: 50 KB each at the very worst).
    """

    def __init__(self, entries: Iterable[tuple[str, T]] = ()) -> None:
        self._root: _Branch[T] = _Branch()
        self._size = 0
        for pattern, value in entries:
            self.add(pattern, value)

    def __len__(self) -> int:
        return self._size

    def add(self, pattern: str, value: T) -> None:
        """Add an entry; adding it again changes nothing. Raises TopicError."""
        check_pattern(pattern, internal=True)
        branch = self._root
        tokens = pattern.split(".")
        rest = tokens[-1] == ">"
        for token in tokens[:-1] if rest else tokens:
            if token != "*":
                branch = branch.literal.setdefault(token, _Branch())
                continue
            if branch.star is None:
                branch.star = _Branch()
            branch = branch.star
        values = branch.rest if rest else branch.here
        self._size += value not in values
        values[value] = None

    def discard(self, pattern: str, value: T) -> None:
        """Remove an entry if it is there, and the branches that only it needed."""
        path: list[tuple[_Branch[T], str]] = []
        branch = self._root
        tokens = pattern.split(".")
        rest = tokens[-1] == ">"
        for token in tokens[:-1] if rest else tokens:
            path.append((branch, token))
            child = branch.star if token == "*" else branch.literal.get(token)
            if child is None:
                return
            branch = child
        values = branch.rest if rest else branch.here
        if value not in values:
            return
        del values[value]
        self._size -= 1
        for parent, token in reversed(path):
            if not branch.is_bare():
                return
            if token == "*":
                parent.star = None
            else:
                del parent.literal[token]
            branch = parent

    def match(self, topic: str) -> list[T]:
        """The values of all patterns that match a valid `topic`, each once; in no promised order."""
        found: dict[T, None] = {}
        tokens = topic.split(".")
        _collect(self._root, tokens, 0, topic[:1] != "$", found)
        return list(found)


def _collect(branch: _Branch[T] | None, tokens: list[str], index: int, wild: bool, found: dict[T, None]) -> None:
    """Add what matches `tokens[index:]` below `branch`. Recurses per `*` only: as deep as a pattern has tokens.

    `wild=False` keeps wildcards out for one token: those in first place leave the reserved topics alone.
    """
    while branch is not None:
        if index == len(tokens):
            found.update(branch.here)
            return
        if wild:
            if branch.rest:
                found.update(branch.rest)
            if branch.star is not None:
                _collect(branch.star, tokens, index + 1, True, found)
        branch = branch.literal.get(tokens[index])
        index += 1
        wild = True


class Matcher:
    """The patterns of one subscription, compiled: does a topic match any of them?

    One regular expression: a quarter of the time of a PatternSet, which pays a Python step per token; for a
    few patterns (time and memory grow with their number, where no literal prefix tells them apart).
    """

    __slots__ = ("_fullmatch", "patterns")

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        for pattern in self.patterns:
            check_pattern(pattern, internal=True)
        self._fullmatch = re.compile("|".join(map(_expression, self.patterns)), re.DOTALL).fullmatch

    def __repr__(self) -> str:
        return f"<Matcher {' '.join(self.patterns)}>"

    def matches(self, topic: str) -> bool:
        """Whether any of the patterns matches a valid `topic`."""
        return self._fullmatch(topic) is not None


def _expression(pattern: str) -> str:
    tokens = pattern.split(".")
    guard = r"(?!\$)" if tokens[0] in ("*", ">") else ""
    wildcards = {"*": "[^.]+", ">": ".+"}
    return guard + r"\.".join(wildcards.get(token) or re.escape(token) for token in tokens)
