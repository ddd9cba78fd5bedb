"""The journal: batches on disk, acknowledged only once they are there. Files only: no sockets, threads or clocks.

`Journal` writes and recovers, `Reader`, `fetch` and `find_time` read, `Retention` says what may go, `inspect` and
`repair` are for operators. How a forwarder's loop drives it, with one worker thread and one sync in flight:

    journal.append(topic, origin, first_seq, count, time_ns, parts)     # for all that has arrived
    if nothing is in flight and (ticket := journal.write(now_ns)):      # a few ms per 16 MiB
        run journal.sync(ticket) in the worker
    when the worker is done:
        commit = journal.finish(ticket)                                 # acknowledge commit.acked, then write again
        if journal.full: every second or so, in the worker:             # see commit.refused
            journal.delete(victims), with victims = journal.retire(now_ns) from the loop; journal.resume()
    when idle: ticket = journal.checkpoint(now_ns), and sync and finish it
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
