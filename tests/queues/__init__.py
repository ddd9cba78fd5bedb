"""Queues as a whole: histories of them, their checker, chaos, and outcomes that are promised."""
