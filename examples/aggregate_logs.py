"""Collect everybody's log lines into one file for each topic: `python examples/aggregate_logs.py logs/ [bus.key]`.

Says what it missed: a gap is a range of lines that no shipper has in memory any more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

import zmqbus


def main() -> None:
    folder = Path(sys.argv[1])
    key = sys.argv[2] if len(sys.argv) > 2 else None
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, TextIO] = {}
    with zmqbus.Node("aggregator", key=key) as node, node.subscribe("logs.>", history=1000) as lines:
        told = 0
        try:
            for line in lines:
                if line.topic not in files:
                    files[line.topic] = (folder / f"{line.topic}.log").open("a", buffering=1)
                print(line.value, file=files[line.topic])
                for gap in lines.gaps[told:]:
                    print(f"missed {gap.count} lines of {gap.topic}: {gap.first} to {gap.last}", file=sys.stderr)
                    told += 1
        except KeyboardInterrupt:
            print(f"{lines.repaired} repaired, {lines.lost} lost", file=sys.stderr)
        finally:
            for file in files.values():
                file.close()


if __name__ == "__main__":
    main()
