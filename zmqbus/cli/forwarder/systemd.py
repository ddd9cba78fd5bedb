"""What systemd is told by a service of Type=notify: see sd_notify(3). Without $NOTIFY_SOCKET nothing is done."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Tells whoever started us how we are. It never blocks, and never fails: nobody may be there to hear it."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        place = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + place[1:] if place.startswith("@") else place
        self._socket: socket.socket | None = None
        self.watchdog: float | None = None
        """Seconds within which it wants to hear that we are alive, each time."""
        if place.startswith(("@", "/")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
            if usec.isdigit() and int(usec) and pid in ("", str(os.getpid())):
                self.watchdog = int(usec) / 1e6

    def tell(self, *assignments: str) -> None:
        """`READY=1`, `STATUS=…`, `STOPPING=1`, `WATCHDOG=1`."""
        if self._socket is not None:
            lines = "\n".join(text.replace("\n", " ") for text in assignments)
            with contextlib.suppress(OSError):
                self._socket.sendto(lines.encode(), self._address)

    def close(self) -> None:
        """No more of it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
