"""Streams of messages, on both sides: gathered, remembered, tracked, acknowledged. Sans-IO."""
