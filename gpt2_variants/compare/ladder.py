"""The ladder of sizes: the baseline's power law, and how much compute it needs for a variant's loss.

At each seed a line is fitted through the baseline's (log compute, log loss); the compute at which it has the variant's
loss, over the variant's own, is the compute multiplier: above 1 the variant saves compute. Intervals are Student's t
over the seeds, of its logarithm. Hestness et al., 2017, and Kaplan et al., 2020, fit such lines.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..report.statistics import Estimate, paired

Point = tuple[float, float]  # training FLOPs, validation loss in nats


@dataclass(frozen=True)
class PowerLaw:
    """loss = exp(intercept) * FLOPs ** exponent.

    Attributes:
        exponent: below 0 where compute helps.
        intercept: the logarithm of the loss at 1 FLOP.
    """

    exponent: float
    intercept: float

    @classmethod
    def fit(cls, points: Sequence[Point]) -> "PowerLaw":
        """Fit the law to two points or more, by least squares of the logarithms.

        Raises:
            ValueError: there are fewer, or their compute is the same.
        """
        compute, loss = (np.log(np.asarray(values, dtype=float)) for values in zip(*points, strict=True))
        if len(set(compute)) < 2:
            raise ValueError("a power law needs runs at two amounts of compute at least")
        exponent, intercept = np.polyfit(compute, loss, 1)
        return cls(float(exponent), float(intercept))

    def loss(self, flops: float) -> float:
        """Return the loss at so much compute."""
        return math.exp(self.intercept + self.exponent * math.log(flops))

    def log_flops(self, loss: float) -> float:
        """Return the logarithm of the compute at which the loss is `loss`."""
        return (math.log(loss) - self.intercept) / self.exponent


@dataclass(frozen=True)
class Multiplier:
    """The compute multiplier of a variant.

    Attributes:
        by_size: size -> of its logarithm, the mean over the seeds with its interval.
        growth: the slope of the logarithm over that of the baseline's compute, likewise; None with one size.
        beyond: sizes at which some loss is lower than any of the baseline's, so that its line is followed beyond its
            end.
    """

    by_size: Mapping[str, Estimate]
    growth: Estimate | None
    beyond: tuple[str, ...]


def multiplier(baseline: Mapping[int, Mapping[str, Point]], variant: Mapping[int, Mapping[str, Point]]) -> Multiplier:
    """Compare a variant with the baseline along the ladder.

    Args:
        baseline, variant: seed -> size -> (training FLOPs, validation loss); seeds and sizes that both have count.

    Raises:
        ValueError: there is no common seed at which the baseline has two sizes.
    """
    logs: dict[str, list[float]] = {}
    slopes, beyond = [], set()
    for seed in sorted(baseline.keys() & variant.keys()):
        rungs = baseline[seed]
        if len(rungs) < 2:
            continue
        law, lowest = PowerLaw.fit(list(rungs.values())), min(loss for _, loss in rungs.values())
        of_seed = {}
        for size in (size for size in rungs if size in variant[seed]):
            flops, loss = variant[seed][size]
            of_seed[size] = law.log_flops(loss) - math.log(flops)
            logs.setdefault(size, []).append(of_seed[size])
            beyond |= {size} if loss < lowest else set()
        if len(of_seed) > 1:
            compute = [math.log(rungs[size][0]) for size in of_seed]
            slopes.append(float(np.polyfit(compute, list(of_seed.values()), 1)[0]))
    if not logs:
        raise ValueError("the baseline has no two sizes at a seed that the variant has too")
    return Multiplier(
        {size: paired(values) for size, values in logs.items()},
        paired(slopes) if slopes else None,
        tuple(size for size in logs if size in beyond),
    )
