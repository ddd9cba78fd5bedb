"""The command line. It only presents: what it shows comes from nodes.

`main` is the entry point of the `zmqbus` script. The commands are gathered in group.py, which is loaded by `main` and
not before: a Ctrl-C while Python still loads things must be as quiet as any other.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(
                    number, signal.SIG_DFL
                )  # ends the process without a word; there is nothing to tidy up yet
    except KeyboardInterrupt:  # just before that
        raise SystemExit(130) from None
    from zmqbus.cli.group import cli
    from zmqbus.cli.shell import stopping

    stopping.prepare()
    code: object = None
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    stopping.conclude(code if isinstance(code, int) else 0)
