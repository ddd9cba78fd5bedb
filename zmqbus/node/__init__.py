"""Nodes: the two faces, synchronous and asyncio, over one engine."""

RELEASE = "0.1.0"
"""Of this software; the wire has a version of its own."""
