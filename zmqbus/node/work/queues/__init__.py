"""Queues: jobs given out by their owner, and taken by workers."""
