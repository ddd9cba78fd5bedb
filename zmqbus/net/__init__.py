"""Sockets, mDNS, keys and the clock: everything that touches the machine and the network."""
