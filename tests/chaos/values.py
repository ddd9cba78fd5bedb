"""Values of messages, of all sizes. Each follows from its message's id: who has to send one again sends the same, and
who is given one knows what it has to be."""

from __future__ import annotations

from hashlib import blake2b


def value_of(topic: str, origin: int, seq: int) -> bytes | str:
    """The value of a message; one in 64 is larger than what travels in one frame."""
    number = int.from_bytes(blake2b(f"{topic} {origin} {seq}".encode(), digest_size=8).digest(), "little")
    size = 16_384 + number % 50_000 if number % 64 == 0 else (0, 20, 100, 100, 400, 2000)[number // 64 % 6]
    text = f"{topic} {origin:x} {seq} " + "x" * size
    return text if number >> 40 & 1 else text.encode()
