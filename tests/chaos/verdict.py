"""What checkers of histories answer with."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import NamedTuple

SHOWN = 20  # violations that a failing test prints; the first ones tell the story


class Violation(NamedTuple):
    """A rule that was broken, and how."""

    kind: StrEnum
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


class Broken(AssertionError):
    """A history with violations."""


class Report(NamedTuple):
    """The verdict, and how much it rests on."""

    violations: list[Violation]
    counts: Counter[str]
    """Events by name, and what else is of interest."""

    @property
    def kinds(self) -> set[StrEnum]:
        return {violation.kind for violation in self.violations}

    def __str__(self) -> str:
        seen = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        if not self.violations:
            return f"sound: {seen}"
        shown = [f"  {violation}" for violation in self.violations[:SHOWN]]
        if (more := len(self.violations) - SHOWN) > 0:
            shown.append(f"  … and {more:,} more")
        return "\n".join([f"{len(self.violations):,} violations in {seen}", *shown])

    def raise_if_broken(self) -> None:
        if self.violations:
            raise Broken(str(self))
