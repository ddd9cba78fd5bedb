"""The event loop of a node's own thread: uvloop where there is one, which takes a quarter off a job's way there and back.

An `AsyncNode` lives on its user's loop, whichever that is.
"""

from __future__ import annotations

import asyncio

__all__ = ["new_loop"]


def new_loop() -> asyncio.AbstractEventLoop:
    """One that does not run yet."""
    try:
        import uvloop
    except ImportError:  # it is not made for Windows, nor for every interpreter
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
