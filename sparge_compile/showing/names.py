"""Site names where there is little room. In: names. Out: what differs between them, and what they share."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Return each name without the parts that all begin and end with, and those parts around a star.

    ``blocks.0.attn1`` and ``blocks.1.attn1`` are ``0`` and ``1`` of ``blocks.*.attn1``.
    """
    if len(set(names)) < 2:
        return list(names), ""
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    first = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    last = next((i for i in range(shortest - first) if len({part[-1 - i] for part in parts}) > 1), 0)
    short = [".".join(part[first : len(part) - last]) for part in parts]
    around = [*parts[0][:first], "*", *parts[0][len(parts[0]) - last :]]
    return short, ".".join(around) if first or last else ""
