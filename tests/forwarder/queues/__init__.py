"""Queues and groups through a forwarder."""
