"""The points of a search space: as Optuna distributions, as a grid, and those that were not tried yet."""

from __future__ import annotations

import itertools
from collections.abc import Container, Hashable, Sequence

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


def canonical(search: SearchConfig, point: Point) -> Point:
    """Return a point with the keys in the order of the space, and whole numbers and real numbers as such."""
    return {path: _canonical(domain, point[path]) for path, domain in search.space.items()}


def identity(point: Point) -> tuple[tuple[str, str], ...]:
    """Return a hashable value that is equal for equal points and different for 1, 1.0 and true."""
    return tuple(sorted((path, repr(value)) for path, value in point.items()))


def untried(search: SearchConfig, tried: Container[Hashable]) -> list[Point]:
    """Return the points of a finite space whose :func:`identity` is not in ``tried``."""
    axes = [_values(domain) for domain in search.space.values()]
    points = (dict(zip(search.space, values, strict=True)) for values in itertools.product(*axes))
    return [point for point in points if identity(point) not in tried]


def _canonical(domain: Domain, value: Value) -> Value:
    if domain.values is not None or isinstance(value, str | bool | None):
        return value
    return int(value) if domain.whole else float(value)


def _values(domain: Domain) -> Sequence[Value]:
    if domain.values is not None:
        return domain.values
    assert domain.whole
    lower, upper = domain.range()
    return range(int(lower), int(upper) + 1)
