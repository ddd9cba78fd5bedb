"""Queues without a forwarder: owners, workers."""
