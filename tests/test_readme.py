"""What README shows runs; what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "logs.web1.nginx" in done.stdout


def test_there_are_blocks() -> None:
    assert len(PYTHON) == 4


def test_the_demo_proves_what_it_says() -> None:
    """The command of the first screen, from its `zmqbus demo` on; the environment is this one."""
    [block] = re.findall(r"<!-- demo -->\n```bash\n(.*?)```", README, re.DOTALL)
    program, *args = block.strip().rsplit("&& ", 1)[1].split()
    assert program == ".venv/bin/zmqbus"
    command = [sys.executable, "-m", "zmqbus", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "Proved: " in done.stdout
    assert "\npaused " in done.stdout


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:tests|docs|tools)/[\w./]+)(?:::(\w+))?`", README))), ids=str
)
def test_named_files_and_tests_exist(name: tuple[str, str]) -> None:
    path = ROOT / name[0]
    assert path.exists()
    if name[1]:
        assert f"def {name[1]}(" in path.read_text()


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w./]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_first_screen_holds_the_two_commands() -> None:
    first_screen = README.splitlines()[:25]
    commands = [line for line in first_screen if line.startswith("python3 -m venv")]
    assert [command.rsplit("&& ", 1)[1] for command in commands] == [
        ".venv/bin/zmqbus demo",
        ".venv/bin/python tools/check.py",
    ]


def test_every_example_compiles_and_is_documented() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        code = path.read_text()
        compile(code, str(path), "exec")
        assert code.startswith('"""')
