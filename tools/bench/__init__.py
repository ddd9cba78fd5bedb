"""Benchmarks of zmqbus against the raw thing, in the same run: `python tools/bench --help`, docs/benchmarks.md.

    cli.py       what the user types; runs the measurements below, shows what they return
    pubsub.py    throughput     roundtrip.py  latency     join.py  discovery     idle.py, many.py  footprint
    faces.py     the sending and receiving loops that `pubsub` compares: raw pyzmq, zmq.asyncio, Node, AsyncNode
    crew.py      worker processes, seen from the parent; child.py: the same from inside
    results.py   samples, budgets, verdicts; report.py: tables, Markdown, JSON, what machine this is

Measurements run only in worker processes. Everything is on loopback, or in network namespaces of its own.
"""
