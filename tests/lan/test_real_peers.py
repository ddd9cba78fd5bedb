"""zmqbus as others see it: Debian's avahi lists a node, and `zmqbus tap` on another host shows live messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lan.agents import PATIENCE_S, Agents, wait_until
from tests.netns import Host, Lan

pytestmark = pytest.mark.netns

NEEDED = ("avahi-daemon", "avahi-browse", "dbus-daemon")
DBUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
AVAHI = """
[server]
use-ipv4=yes
use-ipv6=no
allow-interfaces=eth0
enable-dbus=yes
[publish]
disable-publishing=no
"""
# Its runtime directory is fixed. `ip netns exec` gives every program mounts of its own, so this one is its alone.
START_AVAHI = """
mkdir -p /run/avahi-daemon
mount -t tmpfs none /run/avahi-daemon
exec avahi-daemon --no-drop-root --no-chroot --no-rlimits -f {config}
"""


class Avahi:
    """An avahi-daemon, with a D-Bus of its own, on one host."""

    def __init__(self, host: Host, directory: Path) -> None:
        self._host = host
        bus = directory / "dbus"
        (directory / "dbus.conf").write_text(DBUS.format(socket=bus))
        (directory / "avahi.conf").write_text(AVAHI)
        self._environment = {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={bus}", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        host.popen(["dbus-daemon", "--nofork", f"--config-file={directory / 'dbus.conf'}"])
        wait_until(bus.exists)
        host.popen(["sh", "-c", START_AVAHI.format(config=directory / "avahi.conf")], env=self._environment)
        wait_until(lambda: self._browse("-a").returncode == 0)

    def _browse(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = ["ip", "netns", "exec", self._host.namespace, "avahi-browse", "--terminate", "--parsable", *arguments]
        return subprocess.run(argv, env=self._environment, capture_output=True, text=True, timeout=20)

    def services(self, kind: str) -> list[list[str]]:
        """The resolved services of a type, as avahi-browse's fields."""
        lines = self._browse("--resolve", kind).stdout.splitlines()
        return [line.split(";", 9) for line in lines if line.startswith("=")]


@pytest.mark.skipif(
    not all(map(shutil.which, NEEDED)),
    reason=f"needs {', '.join(NEEDED)}: apt-get install avahi-daemon avahi-utils dbus",
)
def test_avahi_lists_a_node_of_another_host_and_of_its_own(bus: str, key: str, tmp_path: Path) -> None:
    with Lan(hosts=2) as lan, Agents() as agents:
        avahi = Avahi(lan.hosts[0], tmp_path)
        nodes = {}
        for host, name in zip(lan.hosts, "ab", strict=True):
            agent = agents.start(host)
            nodes[host.address] = agent, name, agent.open(name, bus=bus, key=key)
        listed = wait_until(lambda: (found := avahi.services("_zmqbus._tcp")) and len(found) == 2 and found)
        for _, interface, protocol, _, kind, domain, host_name, address, port, txt in listed:
            _, _, opened = nodes.pop(address)
            assert (interface, protocol, kind, domain) == ("eth0", "IPv4", "_zmqbus._tcp", "local")
            assert host_name.endswith(".local")
            assert opened["endpoints"]["inbox"] == f"tcp://{address}:{port}"
            fields = dict(pair.split("=", 1) for pair in txt.strip().strip('"').split('" "'))
            assert fields.pop("epoch").isdigit()
            assert fields == {
                "txtvers": "1",
                "id": f"{opened['origin']:016x}",
                "pub": opened["endpoints"]["pub"].rsplit(":", 1)[1],
                "pv": "1",
                "bus": bus,
            }
        assert nodes == {}


def test_tap_on_a_third_host_sees_live_messages_of_the_others(bus: str, key: str) -> None:
    with Lan(hosts=3) as lan, Agents() as agents:
        a, b = agents.start_all(lan.hosts[:2])
        for agent, name in ((a, "a"), (b, "b")):
            agent.open(name, bus=bus, key=key)
            agent.ask("flow", node=name, topic=f"from.{name}", rate=200)
        tap = lan.hosts[2].popen(
            [sys.executable, "-m", "zmqbus", "--bus", bus, "--key-file", key, "tap", "--json", "-n", "1000", "from.>"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        shown, said = tap.communicate(timeout=PATIENCE_S)
        assert (tap.returncode, said) == (0, "zmqbus: 1,000 messages shown; nothing lost\n")
        seqs: dict[str, list[int]] = {}
        for line in shown.splitlines():
            message = json.loads(line)
            assert message["value"] == message["seq"]
            seqs.setdefault(message["topic"], []).append(message["seq"])
        assert set(seqs) == {"from.a", "from.b"}
        for received in seqs.values():
            assert received == list(range(received[0], received[0] + len(received)))
