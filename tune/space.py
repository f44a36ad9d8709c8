"""A searched key's values as Optuna draws them, and as a grid: pure functions of ``search.space``."""

from __future__ import annotations

import itertools

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from dreamfleet.trainers.config.search import Domain, Point, SearchConfig, Value


def distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    """Return the space in Optuna's terms."""
    return {path: _distribution(domain) for path, domain in search.space.items()}


def grid(search: SearchConfig) -> list[Point]:
    """List every point of the grid, the last key changing fastest."""
    axes = [_axis(domain) for domain in search.space.values()]
    return [dict(zip(search.space, values, strict=True)) for values in itertools.product(*axes)]


def _distribution(domain: Domain) -> BaseDistribution:
    if domain.values is not None:
        return CategoricalDistribution(domain.values)
    lower, upper = domain.range()
    if domain.whole:
        return IntDistribution(int(lower), int(upper), log=domain.log)
    return FloatDistribution(lower, upper, log=domain.log)


def _axis(domain: Domain) -> list[Value]:
    if domain.values is not None:
        return list(domain.values)
    assert domain.num is not None  # as the recipe's own check says of a grid
    lower, upper = domain.range()
    places = [k / (domain.num - 1) for k in range(domain.num)]
    if domain.log:
        spread = [lower * (upper / lower) ** place for place in places]
    else:
        spread = [lower + (upper - lower) * place for place in places]
    spread[-1] = upper  # as it was written, whatever the rounding above made of it
    return list(dict.fromkeys(round(v) for v in spread)) if domain.whole else list(spread)
