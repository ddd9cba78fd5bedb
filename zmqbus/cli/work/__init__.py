"""Work that is shared: `zmqbus push` and `pull` (push.py, pull.py), `queues`, `dead`, and `request`."""
