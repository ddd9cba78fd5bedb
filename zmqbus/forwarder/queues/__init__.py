"""Queues and groups of a forwarder: given to workers from the journal, and what became of it kept in cursors.

A message's way: `Tail` knows it from the moment it was appended, and has it until it is on disk; `Queues` adds it to
the dispatcher of `Desk`, if there are workers, or leaves it where it is, for `Loader` to read when there are. What is
done is noted in its `Backlog`, and `Scribe` writes that down before the worker is told.
"""

from zmqbus.forwarder.queues.queues import Queues, take_up

__all__ = ["Queues", "take_up"]
