"""Requests: one node asks, another answers, once."""
