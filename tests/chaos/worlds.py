"""Worlds of chaos as processes of their own: run many, tell of all that went wrong.

A world's module is run as `python -m MODULE FOLDER SEED KILLS`, and prints one JSON object: `seed`, `kills` (by kind of
role), `counts` (of what its verdict rests on), `broken` (what went wrong), and what else there is to know.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORLD_TIMEOUT = 400.0  # seconds; of a world that ends, even if not well


def world(module: str, seed: int, folder: Path, kills: int, path: Sequence[Path]) -> dict[str, Any]:
    """What came of one. What is found wrong is left in the folder."""
    folder.mkdir()
    argv = [sys.executable, "-m", module, str(folder), str(seed), str(kills)]
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, (ROOT, *path)))}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WORLD_TIMEOUT)
    assert done.returncode == 0, f"ZMQBUS_SEED={seed}: {done.stderr}"
    facts: dict[str, Any] = json.loads(done.stdout)
    if not facts["broken"]:
        shutil.rmtree(folder)
    return facts


def worlds(
    module: str, seeds: Iterator[int], folder: Path, kills: int, at_once: int, path: Sequence[Path] = ()
) -> Counter[str]:
    """What came of all; those that went wrong are told of together. `path`: where else to look for modules."""
    kinds: Counter[str] = Counter()
    broken: list[str] = []
    with ThreadPoolExecutor(at_once) as threads:
        for facts in threads.map(lambda seed: world(module, seed, folder / f"world-{seed}", kills, path), seeds):
            print(json.dumps(facts))
            if facts["broken"]:
                broken.append(f"ZMQBUS_SEED={facts['seed']}, see {folder}/world-{facts['seed']}:")
                broken += facts["broken"]
            else:
                kinds.update(facts["kills"])
                kinds.update({f"{count} events": number for count, number in facts["counts"].items()})
    assert not broken, "\n".join(broken)
    return kinds
