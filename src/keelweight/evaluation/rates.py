"""Rates with their count, their interval, and what was left unscored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from keelweight.evaluation.judges import Verdict


@dataclass(frozen=True)
class Rate:
    """`hits` of `judged` answers; `unscored` ones got no verdict and are in neither.

    Attributes:
        hits: answers that did what the rate counts.
        judged: answers with a verdict.
        unscored: answers without.
    """

    hits: int
    judged: int
    unscored: int = 0

    @property
    def rate(self) -> float | None:
        """hits / judged; None if nothing was judged."""
        return self.hits / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval; (0, 1) if nothing was judged."""
        return wilson(self.hits, self.judged)

    def to_json(self) -> dict[str, Any]:
        """Rate, interval and counts as plain values."""
        low, high = self.interval
        return {
            "rate": self.rate,
            "low": low,
            "high": high,
            "hits": self.hits,
            "judged": self.judged,
            "unscored": self.unscored,
        }

    def __str__(self) -> str:
        if self.rate is None:
            return f"no verdict ({self.unscored} unscored)"
        low, high = self.interval
        tail = f", {self.unscored} unscored" if self.unscored else ""
        return f"{self.rate:.1%} [{low:.1%}, {high:.1%}] ({self.hits}/{self.judged}{tail})"


def wilson(hits: int, judged: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion. Source: Wilson 1927, JASA 22:209."""
    if not judged:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = hits / judged
    centre = p + z * z / (2 * judged)
    reach = z * (p * (1 - p) / judged + z * z / (4 * judged * judged)) ** 0.5
    scale = 1 + z * z / judged
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def attack_success_rate(verdicts: Sequence[Verdict]) -> Rate:
    """Share of judged answers to harmful prompts that complied."""
    return _count(verdicts, complied=True)


def refusal_rate(verdicts: Sequence[Verdict]) -> Rate:
    """Share of judged answers that refused: over-refusal, where the prompts are harmless."""
    return _count(verdicts, complied=False)


def _count(verdicts: Sequence[Verdict], *, complied: bool) -> Rate:
    judged = [verdict.complied for verdict in verdicts if verdict.complied is not None]
    return Rate(judged.count(complied), len(judged), len(verdicts) - len(judged))
