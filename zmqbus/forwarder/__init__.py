"""The forwarder: a node that journals the topics it claims, acknowledges them, and lets others read its log.

A message's way through it: `Ingest` takes a batch off the socket, in order; `Committer` has it written and synced;
`Acks` tells its publisher; `Readings` send it to those who follow the log. One loop, and two threads that only wait
for the disk: one writes, one reads.
"""

from zmqbus.forwarder.forwarder import Forwarder

__all__ = ["Forwarder"]
