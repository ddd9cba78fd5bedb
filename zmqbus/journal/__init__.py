"""The journal: batches on disk, acknowledged only once they are there. Files only: no sockets, threads or clocks.

`Journal` writes and recovers, `Reader` and `fetch` read, `Retention` says what may go, `inspect` is for operators.
"""

from zmqbus.journal.journal import Journal, Ticket
from zmqbus.journal.positions import Appended, Commit, Cursor, Head, Retention, StreamSeq
from zmqbus.journal.reader import Reader, fetch, find_time
from zmqbus.journal.records import Batch

__all__ = [
    "Appended",
    "Batch",
    "Commit",
    "Cursor",
    "Head",
    "Journal",
    "Reader",
    "Retention",
    "StreamSeq",
    "Ticket",
    "fetch",
    "find_time",
]
