"""What a claim is, what a measurement of it is, and the one rule that turns the two into a verdict."""

import math
from dataclasses import dataclass
from typing import Any, Literal

REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly", "not reproduced"
NOT_EVALUATED = "not evaluated"
ORDER = {REPRODUCED: "reproduced", PARTLY: "partly", NOT_REPRODUCED: "not", NOT_EVALUATED: "not evaluated"}
"""The verdicts from good to none, each as a sentence says it."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and the criterion by which it is judged.

    Attributes:
        id: its name in the notebooks, lower case with hyphens.
        chapter: the chapter that measures it, such as ``"02_sinusoids"``.
        place: where the paper makes it, such as ``"Section 3, Figure 1"``.
        sentence: the claim, in one sentence.
        quantity: what is measured, with its unit.
        direction: ``"<"`` or ``">"`` a threshold, or ``"in"`` a closed interval.
        threshold: one number, or (low, high) for ``"in"``.
        paper_value: what the paper reports, as text; an empty text when it gives no number.
    """

    id: str
    chapter: str
    place: str
    sentence: str
    quantity: str
    direction: Literal["<", ">", "in"]
    threshold: float | tuple[float, float]
    paper_value: str = ""

    def __post_init__(self) -> None:
        if (self.direction == "in") != isinstance(self.threshold, tuple) or self.direction not in ("<", ">", "in"):
            raise ValueError(
                f"claim {self.id!r}: direction '<' or '>' goes with one threshold, 'in' with (low, high); "
                f"got {self.direction!r} with {self.threshold!r}"
            )

    @property
    def criterion(self) -> str:
        """The criterion in a few characters, such as ``< 0``."""
        if isinstance(self.threshold, tuple):
            low, high = (plain(end, 3) for end in self.threshold)
            return f"in [{low}, {high}]"
        return f"{self.direction} {plain(self.threshold, 3)}"

    def meets(self, value: float) -> bool:
        """Whether a value meets the criterion."""
        if isinstance(self.threshold, tuple):
            return self.threshold[0] <= value <= self.threshold[1]
        return value < self.threshold if self.direction == "<" else value > self.threshold


@dataclass(frozen=True)
class Record:
    """What was measured for a claim, on which data, and the verdict. All fields are JSON's own types."""

    claim: str
    criterion: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    profile: str
    data: str
    description: str
    stand_in: bool
    note: str
    verdict: str

    @property
    def text(self) -> str:
        """The value with its 95 % interval, with the digits that an interval of its width leaves any meaning.

        Alone where nothing varies: a count, or the error of an identity.
        """
        if self.value is None or self.low is None or self.high is None:
            return "not measured"
        if self.low == self.high:
            return plain(self.value)
        width = abs(self.high - self.low)
        decimals = max(1 - math.floor(math.log10(width)), 0)
        while decimals <= 6 and any(v and round(v, decimals) == 0 for v in (self.low, self.high)):
            decimals += 1  # a verdict may hang on which side of zero an end lies
        if decimals > 6:
            largest = max(abs(self.low), abs(self.high))
            digits = math.floor(math.log10(largest)) - math.floor(math.log10(width)) + 2
            return f"{plain(self.value, digits)} [{plain(self.low, digits)}, {plain(self.high, digits)}]"
        value, low, high = (f"{v:.{decimals}f}".replace("-", "−") for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def plain(value: float, digits: int = 2) -> str:
    """A number by its first digits: ``0.0032``, ``280``, ``9.2e−10``; whole numbers by all."""
    if value == round(value) and abs(value) < 1e9:
        return f"{value:.0f}".replace("-", "−")
    text = f"{value:.{digits}g}"
    return (f"{float(text):.0f}" if "e+" in text and abs(value) < 1e6 else text).replace("-", "−")


def inconclusive(claim: Claim, result: Record) -> bool:
    """Whether the value misses the criterion while a part of its 95 % interval meets it.

    The verdict is *not reproduced* all the same, as *partly* is where the value meets it and a part of the interval
    does not: the measurement does not exclude the claim.
    """
    if result.verdict != NOT_REPRODUCED or result.low is None or result.high is None:
        return False
    if isinstance(claim.threshold, tuple):
        return result.low <= claim.threshold[1] and result.high >= claim.threshold[0]
    return claim.meets(result.low) or claim.meets(result.high)


def judge(
    claim: Claim,
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    profile: str,
    stand_in: bool,
) -> str:
    """The verdict, by the one rule for all claims.

    *Reproduced* when the whole 95 % interval [low, high] meets the criterion, *partly* when only the value does, *not
    reproduced* otherwise; *not evaluated* on a stand-in for the data, in the quick profile, or without a measurement.
    """
    if value is None or low is None or high is None or stand_in or profile == "quick":
        return NOT_EVALUATED
    if claim.meets(low) and claim.meets(high):
        return REPRODUCED
    return PARTLY if claim.meets(value) else NOT_REPRODUCED


def make_record(
    claim: Claim,
    value: float | None,
    low: float | None,
    high: float | None,
    provenance: Any,
    profile: str,
    n: int,
    note: str = "",
) -> Record:
    """A record with its verdict; arguments as in :func:`ntkbook.publish.claims.record`."""
    numbers = (value, low, high)
    if value is None:
        if low is not None or high is not None:
            raise ValueError(f"claim {claim.id!r}: an interval [{low}, {high}] came without a value; give all or none")
    elif low is None or high is None or not all(math.isfinite(float(v)) for v in numbers if v is not None):
        raise ValueError(
            f"claim {claim.id!r}: expected a finite value with a finite 95 % interval, got {value} [{low}, {high}]; "
            "pass None for all three when nothing was measured"
        )
    elif not low <= value <= high:
        raise ValueError(f"claim {claim.id!r}: the value {value} lies outside its interval [{low}, {high}]")
    value, low, high = (None if v is None else float(v) for v in numbers)
    stand_in = bool(provenance.is_stand_in)
    return Record(
        claim=claim.id,
        criterion=claim.criterion,
        value=value,
        low=low,
        high=high,
        n=int(n),
        profile=profile,
        data=provenance.name,
        description=provenance.description,
        stand_in=stand_in,
        note=note,
        verdict=judge(claim, value, low, high, profile=profile, stand_in=stand_in),
    )
