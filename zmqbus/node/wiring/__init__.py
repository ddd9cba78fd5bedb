"""Sockets as a node uses them: what is sent and received on them, not what it means."""
