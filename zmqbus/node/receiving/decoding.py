"""Batches into messages, by one C call each: for what comes live, and for what comes out of the log."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import count, repeat
from typing import Any

import msgspec

from zmqbus.errors import DecodeError
from zmqbus.protocol.frames import Batch, ValueDecoder
from zmqbus.protocol.message import Message


class Unpacker(ValueDecoder):
    """The messages of a batch, as an iterator. Values that do not fit the type raise, each in its place."""

    def unpack(
        self, topic: str, batch: Batch, skip: int = 0, stop: int | None = None, offset: int | None = None
    ) -> tuple[Iterator[Message], Iterator[Any]]:
        """The messages without the first `skip`, and up to before the `stop`-th; `offset`: of the batch's first.

        The second iterator is what the first draws from: its length hint says how many are left.

        Raises:
            RemoteProtocolError: the payload is not `count` values of msgpack.
        """
        try:
            values, headers = self.decode(batch)
        except msgspec.ValidationError:
            values, headers = self.decode_each(batch)
            checked = Checked(topic, batch, values[:stop], headers, skip, offset)
            return checked, checked
        if skip or stop is not None:
            values = values[skip:stop]
            headers = headers and headers[skip:stop]
        source = iter(values)
        messages = map(
            Message,
            repeat(topic),
            source,
            count(batch.first + skip),
            repeat(batch.origin),
            repeat(batch.time_ns / 1e9),
            repeat(None) if headers is None else headers,
            repeat(None) if offset is None else count(offset + skip),
        )
        return messages, source


class Checked:
    """Messages of a batch in which some values do not fit the type: those raise, in their place."""

    def __init__(
        self,
        topic: str,
        batch: Batch,
        values: list[Any],
        headers: list[dict[str, Any] | None] | None,
        skip: int,
        offset: int | None,
    ) -> None:
        self._topic, self._batch, self._values, self._headers = topic, batch, values, headers
        self._offset = offset
        self._place = skip

    def move(self) -> Checked:
        """The rest, for another to take; here is none any more."""
        rest = copy(self)
        self._place = len(self._values)
        return rest

    def __iter__(self) -> Iterator[Message]:
        return self

    def __length_hint__(self) -> int:
        return len(self._values) - self._place

    def __next__(self) -> Message:
        place, batch = self._place, self._batch
        if place >= len(self._values):
            raise StopIteration
        self._place += 1
        value = self._values[place]
        if isinstance(value, msgspec.ValidationError):
            raise DecodeError(self._topic, batch.origin, batch.first + place, str(value))
        headers = self._headers[place] if self._headers is not None else None
        offset = None if self._offset is None else self._offset + place
        return Message(self._topic, value, batch.first + place, batch.origin, batch.time_ns / 1e9, headers, offset)
