"""What a benchmark found: figures of its cases, and the ratios that are held against budgets.

What lives here: the shape of a report, and of what ``bench … --json`` prints. What must not: measuring.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one case over the rounds; ``skipped`` says why there is none."""

    case: str
    metric: str
    unit: str
    median: float | None = None
    min: float | None = None
    max: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of ours over a reference's, and whether it keeps its budget (``>=`` for speed, ``<=`` for memory and cost)."""

    name: str
    value: float | None
    budget: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.budget if self.at_most else self.value >= self.budget


@dataclass(frozen=True, slots=True)
class Report:
    """Of one benchmark; ``as_dict`` is what ``--json`` prints."""

    bench: str
    rows: int
    results: tuple[Result, ...]
    ratios: tuple[Ratio, ...]

    @property
    def met(self) -> bool:
        """Whether no measured ratio misses its budget."""
        return all(ratio.met is not False for ratio in self.ratios)

    def as_dict(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "machine": {
                "cpus": os.cpu_count(),
                "system": platform.system(),
                "arch": platform.machine(),
                "python": platform.python_version(),
            },
            "rows": self.rows,
            "results": [{k: v for k, v in asdict(result).items() if v is not None} for result in self.results],
            "ratios": [{"name": r.name, "value": r.value, "budget": r.budget, "met": r.met} for r in self.ratios],
        }


Told = Callable[[str], None]
