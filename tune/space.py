"""Converts the search space into Optuna distributions and into a grid of points."""

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
    """Return an Optuna distribution for every key."""
    return {path: _distribution(domain) for path, domain in search.space.items()}


def grid(search: SearchConfig) -> list[Point]:
    """Return all points of the grid, the last key changing fastest."""
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
    assert domain.num is not None  # checked with the recipe
    lower, upper = domain.range()
    places = [k / (domain.num - 1) for k in range(domain.num)]
    if domain.log:
        spread = [lower * (upper / lower) ** place for place in places]
    else:
        spread = [lower + (upper - lower) * place for place in places]
    spread[-1] = upper  # exactly the recipe's value, without rounding errors
    return list(dict.fromkeys(round(v) for v in spread)) if domain.whole else list(spread)
