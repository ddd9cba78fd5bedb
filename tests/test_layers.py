"""The import graph is the architecture, and this is what keeps it so: ground to roof, each layer knows those below."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "zmqbus"
LAYERS = {
    "errors": set(),
    "protocol": {"errors"},
    "journal": {"errors", "protocol"},
    "net": {"errors", "protocol"},
    "node": {"errors", "protocol", "journal", "net"},
    "forwarder": {"errors", "protocol", "journal", "net", "node"},
    "cli": {"errors", "protocol", "journal", "net", "node", "forwarder"},
}
ONLY_IN = {
    "zmq": {"net"},
    "zeroconf": {"net"},
    "ifaddr": {"net"},
    "click": {"cli"},
    "rich": {"cli"},
    "time": {"net"},
    "threading": {"net", "node", "forwarder", "cli"},
    "asyncio": {"net", "node", "forwarder", "cli"},
    "socket": {"net", "node", "forwarder", "cli"},
    "random": {"node", "forwarder"},
    "secrets": {"net", "node", "cli"},
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem == "errors")
LINES_MAX = 500
THINGS_MAX = 9


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", [alias.name for alias in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(path)
    for module, names in imports(path):
        top, *rest = module.split(".")
        if top == "zmqbus":
            assert rest or set(names) <= set(LAYERS), f"{path} imports from the package's face"
            for below in rest[:1] or names:
                assert below == layer or below in LAYERS[layer], f"{path}: {layer} imports {below}"
        else:
            assert layer in ONLY_IN.get(top, {layer}), f"{path}: {top} belongs in {ONLY_IN[top]}"


def test_no_cycles() -> None:
    known = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    known = {name.removesuffix(".__init__"): path for name, path in known.items()}
    edges = {}
    for name, path in known.items():
        wanted = set()
        for module, names in imports(path):
            deeper = {f"{module}.{attribute}" for attribute in names} & known.keys()
            wanted |= deeper or ({module} & known.keys())
        edges[name] = wanted - {name}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the loop


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_tells_one_story(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX
    if path.stem != "__main__":
        assert ast.get_docstring(ast.parse(path.read_text())), "says at its top what may happen in it"


@pytest.mark.parametrize(
    "folder", [ROOT, *(path for path in ROOT.iterdir() if path.is_dir())], ids=lambda path: path.name
)
def test_a_folder_is_seen_at_a_glance(folder: Path) -> None:
    things = [path.name for path in folder.iterdir() if path.name not in ("__pycache__", "__init__.py", "py.typed")]
    assert len(things) <= THINGS_MAX, things


def test_only_the_factory_binds_and_connects() -> None:
    for path in MODULES:
        if path.name != "sockets.py":
            found = re.findall(r"\b(?:socket|_socket|dealer|router|pub|sub)\.(?:bind|connect)\(", path.read_text())
            assert not found, f"{path}: sockets are bound and connected by the factory, which keeps strangers out"
