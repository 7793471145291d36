"""Checks of the losses' settings: an error that names the field, its value and the rule.

Floor 1.
"""

from __future__ import annotations

import math
from typing import Any

from rest_jax import errors


def require(condition: bool, config: Any, field: str, rule: str) -> None:
    """Refuses a field of a settings object.

    Args:
      condition: whether the field is right.
      config: the settings.
      field: its name.
      rule: what it has to be, as it ends the sentence "x = 3 must be …".

    Raises:
      ConfigError: the condition does not hold.
    """
    if not condition:
        raise errors.ConfigError(
            f"{field} = {getattr(config, field)!r} must be {rule}",
            where=f"{type(config).__name__}.{field}",
            remedy="Mend the binding",
        )


def require_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    """The field is one of a few words."""
    value = getattr(config, field)
    listed = ", ".join(f'"{choice}"' for choice in choices)
    require(isinstance(value, str) and value in choices, config, field, f"one of {listed}")


def require_number(
    config: Any,
    field: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    optional: bool = False,
) -> None:
    """The field is a finite number in [low, high], or in (low, high] with `above`; None where `optional`."""
    value = getattr(config, field)
    if optional and value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    inside = is_number and (low < value if above else low <= value) and value <= high
    bounds = f"{'above' if above else 'at least'} {low:g}" if math.isfinite(low) else "finite"
    if math.isfinite(high):
        bounds += f" and at most {high:g}"
    require(inside, config, field, f"a number {bounds}{', or None' if optional else ''}")


def require_whole(config: Any, field: str, low: int) -> None:
    """The field is a whole number of at least `low`."""
    value = getattr(config, field)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    require(is_whole and value >= low, config, field, f"a whole number of at least {low}")
