"""What a measurement yields: samples, one for each run, with their raw counterparts, and a verdict. Pure values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True)
class Budget:
    """What must be reached: `at_least` or `at_most`, by the ratio to the raw thing or by the value itself."""

    of: Literal["ratio", "value"]
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, reached: float) -> bool:
        """Whether `reached` is within the budget."""
        return (self.at_least is None or reached >= self.at_least) and (self.at_most is None or reached <= self.at_most)


@dataclass
class Line:
    """One line of a table. Run i of `ours` was made right after run i of `raw`."""

    label: str
    unit: str
    ours: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    raw_name: str = ""
    comparable: bool = True
    """Whether the ratio means something; else `raw` is there for orientation."""
    budget: Budget | None = None
    lost: int | None = None
    """Messages that never arrived, over all runs. Rates of runs with such are 0."""
    repaired: int | None = None
    """Messages that the live path missed and that arrived nevertheless."""
    details: dict[str, float] = field(default_factory=dict)
    """Medians of what else was measured; in the JSON only."""

    @property
    def ratios(self) -> list[float]:
        """Of each run to the raw run beside it: what slows the machine for a while slows both."""
        if not self.comparable:
            return []
        return [ours / raw for ours, raw in zip(self.ours, self.raw, strict=False) if raw > 0]

    @property
    def passed(self) -> bool | None:
        """Whether the budget is met and nothing was lost; None: there is nothing to be met, or nothing was measured."""
        if self.lost:
            return False
        reached = self.ours if self.budget is None or self.budget.of == "value" else self.ratios
        return self.budget.holds(median(reached)) if self.budget is not None and reached else None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        facts = asdict(self)
        for name in ("ours", "raw", "ratios"):
            values = getattr(self, name)
            facts[name] = {**spread(values), "runs": values} if values else None
        return {**facts, "passed": self.passed}


@dataclass
class Table:
    """One measurement's lines."""

    title: str
    notes: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def percentile(values: list[float], percent: float) -> float:
    """The value that `percent` of all are at or below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
