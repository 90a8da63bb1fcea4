"""The space of a study: what Hydra's sweep syntax stands for among Optuna's distributions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    Transformer,
)

from anomaly_lit.types import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = dict[str, "BaseDistribution"]


def split(lines: Sequence[str], loader: ConfigLoader | None = None) -> tuple[list[str], Space]:
    """Return the overrides that all trials share, and what the others are drawn from.

    Of two overrides with one key the last counts.

    >>> fixed, space = split(["a=1", "b=interval(0,1.5)", "b=2,3"])  # doctest: +SKIP
    >>> fixed, space["b"].choices  # doctest: +SKIP
    (['a=1'], (2, 3))
    """
    shared: dict[str, str] = {}
    space: Space = {}
    for override in OverridesParser.create(loader).parse_overrides(list(lines)):
        name, line = override.get_key_element(), override.input_line
        assert line is not None
        shared.pop(name, None)
        space.pop(name, None)
        if override.is_sweep_override():
            space[name] = distribution_of(override)
        else:
            shared[name] = line
    return list(shared.values()), space


def distribution_of(override: Override) -> BaseDistribution:
    """Read what Hydra's `a,b`, `choice`, `glob`, `range` and `interval` stand for.

    `int(interval(1,4))` gives whole numbers, both ends included, and
    `tag(log,interval(1e-5,1e-3))` draws the logarithm.

    Raises:
        UserError: It is an interval that Optuna refuses.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    if not isinstance(value, IntervalSweep):
        choices: list[Any] = list(override.sweep_iterator(encoded))
        return CategoricalDistribution(choices)
    low, high, log = value.start, value.end, "log" in value.tags
    try:
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low or 0), float(high or 0), log=log)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error


def encoded(value: Any) -> Any:
    """Return numbers as they are, all else as an override would write it."""
    return value if isinstance(value, int | float) else Transformer.str(value)


def first_of(distribution: BaseDistribution) -> Any:
    """Return some value of a distribution."""
    choices = getattr(distribution, "choices", None)
    return choices[0] if choices else getattr(distribution, "low")  # noqa: B009


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Return values as overrides.

    >>> overrides_of({"method.sigma": 0.5, "shots": None})
    ['method.sigma=0.5', 'shots=null']
    """
    return [f"{name}={'null' if value is None else value}" for name, value in values.items()]


def written(value: Any) -> str:
    """Return plain data as the value of an override.

    >>> written({"path": "a b", "depth": [1, None, True]})
    "{path:'a b',depth:[1,null,true]}"
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
