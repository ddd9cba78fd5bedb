"""The config file of `zmqbus forwarder`: its keys are the names of the options, and the command line wins over it.

The global options that say which bus may stand in it as well. A path in it is relative to the file's directory.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from zmqbus.cli.shell.bus import Bus
from zmqbus.errors import TopicError

# What a key may hold, as Python has it, and as a user is told.
_TEXT = (str,), "a text"
_TEXTS = (str, list), "a text, or a list of texts"
_SIZE = (str, int), 'a size such as "10G", or a number of bytes'
_TIME = (str, int, float), 'a duration such as "7d", or a number of seconds'
KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "journal": _TEXT,
    "topics": _TEXTS,
    "max-bytes": _SIZE,
    "max-age": _TIME,
    "on-full": _TEXT,
    "name": _TEXT,
    "bus": _TEXT,
    "key-file": _TEXT,
    "interface": _TEXT,
    "peer": _TEXTS,
}
_PATHS = ("journal", "key-file")


def load(path: str) -> dict[str, Any]:
    """The settings in a file. Raises OSError, and UsageError that names the mistake."""
    with open(path, "rb") as file:
        try:
            settings = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{path}: it is no TOML: {error}") from None
    for key, value in settings.items():
        if key not in KEYS:
            raise click.UsageError(f"{path}: there is no setting {key!r}{_nearest(key)}")
        kinds, words = KEYS[key]
        parts = value if isinstance(value, list) and list in kinds else [value]
        if not all(isinstance(part, kinds) and not isinstance(part, bool | list) for part in parts):
            raise click.UsageError(f"{path}: {key} = {_shown(value)}: write {words}")
        if value in ("", []):
            raise click.UsageError(f"{path}: {key} is empty: write {words}, or leave it out")
        if key in _PATHS:
            settings[key] = str(Path(path).parent / value)
        elif list in kinds:
            settings[key] = parts
    return settings


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key.lower().replace("_", "-"), KEYS, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(KEYS)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def configure(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """As the callback of --config, before all other options: what the file says takes the place of their defaults."""
    if path is None or context.resilient_parsing:
        return path
    settings = load(path)
    defaults: dict[str, Any] = {}
    for option in context.command.params:
        for key in (name.removeprefix("--") for name in option.opts):
            if key in settings and option.name is not None:
                defaults[option.name] = settings[key]
                try:
                    option.process_value(context, settings[key])
                except click.BadParameter as error:
                    raise click.UsageError(f"{path}: {key}: {error.message}") from None
                except TopicError as error:
                    raise click.UsageError(f"{path}: {key}: {error}") from None
    context.default_map = defaults
    context.obj = _bus(context, settings)
    return path


def _bus(context: click.Context, settings: dict[str, Any]) -> Bus:
    """The global options: those of the command line and the environment win."""
    bus: Bus = context.obj
    root = context.find_root()
    found = {
        field: settings[key]
        for key, field in (("bus", "name"), ("key-file", "key_file"), ("interface", "interface"), ("peer", "peers"))
        if key in settings
        and root.get_parameter_source({"name": "bus"}.get(field, field))
        not in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    }
    if "peers" in found:
        found["peers"] = tuple(found["peers"])
    return msgspec.structs.replace(bus, **found)
