"""Check what a user gives for a calibration: thresholds by site, phases, an aim, the influence of heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import type_error, value_error
from ..keeping import NOTHING, Kept, parse_kept
from ..kernels.order import Tile, parse_tile
from ..pair import Pair, Sites, check_pair


def check_sites(field: str, sites: Any) -> dict[str, tuple[Pair, ...]]:
    """Return thresholds by site as tuples of floats.

    Raises:
        TypeError: ``field`` is no mapping, or a threshold no number.
        ValueError: a name is no text, a site has no pairs, or a threshold is out of range.
    """
    if not isinstance(sites, Mapping):
        raise type_error(
            f"Calibration: {field} has the wrong type",
            given=type(sites).__name__,
            allowed="a mapping from site name to (topk, topp) pairs",
            todo="Load a file with Calibration.load(path), or pass a dict.",
        )
    return {name: _check_site(name, pairs) for name, pairs in sites.items()}


def _check_site(name: object, pairs: Any) -> tuple[Pair, ...]:
    where = f"calibration of site {name!r}"
    is_list = isinstance(pairs, (list, tuple)) and len(pairs) > 0
    if not isinstance(name, str) or not is_list or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise value_error(
            f"{where} cannot be read",
            given=repr(pairs)[:80],
            allowed="a list of (topk, topp) pairs, one for each query head",
            todo="Give one pair for all heads, or one for each.",
        )
    return tuple(check_pair(topk, topp, where) for topk, topp in pairs)


def fitting(
    name: str, pairs: tuple[Pair, ...], heads: int, measured_size: int | None, head_size: int | None
) -> tuple[Pair, ...]:
    """Return the pairs of a site with so many heads; ``measured_size`` is that of measured heads.

    Raises:
        ValueError: there are others, or heads of another size were measured.
    """
    if measured_size is not None and head_size not in (None, measured_size):
        raise _does_not_fit(name, f"thresholds for heads of size {measured_size}", f"heads of size {head_size}")
    if len(pairs) == 1 and (measured_size is None or heads == 1):
        return pairs * heads
    if len(pairs) != heads:
        allowed = f"{heads} pairs, one for each query head" + (", or a single pair" if measured_size is None else "")
        raise _does_not_fit(name, f"thresholds for {len(pairs)} heads", allowed, len(pairs) % heads == 0)
    return pairs


def _does_not_fit(name: str, given: str, allowed: str, shared: bool = False) -> ValueError:
    more = " Where processes share the heads of a diffusers model, call sparge_compile.shard_attention(model)."
    return value_error(
        f"calibration of site {name!r} does not fit the model",
        given=given,
        allowed=allowed,
        todo=f"Calibrate this model, or load the file that was made for it.{more * shared}",
    )


def check_kept(kept: Any, sites: Sites) -> dict[str, Kept]:
    """Return what is kept by entry of a calibration; entries that keep nothing are left out.

    Raises:
        TypeError, ValueError: no mapping, an entry without thresholds, or what cannot be kept.
    """
    if not isinstance(kept, Mapping) or not set(kept) <= set(sites):
        raise value_error(
            "Calibration: bad kept",
            given=f"entries {sorted(map(str, set(kept) - set(sites)))}" if isinstance(kept, Mapping) else repr(kept),
            allowed=f"a mapping from entries of sites: {', '.join(map(str, sites)) or 'none'}"[:200],
            todo='Give kept={"*": {"keep_keys": 512, "dense_queries": True}} for an entry "*" of sites.',
        )
    found = {name: _check_kept(name, entry) for name, entry in kept.items()}
    return {name: entry for name, entry in found.items() if entry != NOTHING}


def _check_kept(name: str, entry: Any) -> Kept:
    where = f"calibration of site {name!r}"
    if isinstance(entry, Kept):
        return parse_kept(entry.keys, entry.dense_queries, where)
    if not isinstance(entry, Mapping) or not set(entry) <= {"keep_keys", "dense_queries"}:
        raise value_error(
            f"{where}: what is kept cannot be read",
            given=repr(entry)[:80],
            allowed="a dict with keep_keys and dense_queries, as the options have them",
            todo='As {"keep_keys": 512, "dense_queries": True}.',
        )
    return parse_kept(entry.get("keep_keys"), entry.get("dense_queries", False), where)


def check_tiles(tiles: Any, sites: Sites) -> dict[str, Tile]:
    """Return the tiles by entry of a calibration.

    Raises:
        ValueError: no mapping, an entry without thresholds, or no box of at most 64 tokens.
    """
    if not isinstance(tiles, Mapping) or not set(tiles) <= set(sites):
        raise value_error(
            "Calibration: bad tiles",
            given=f"entries {sorted(map(str, set(tiles) - set(sites)))}" if isinstance(tiles, Mapping) else repr(tiles),
            allowed=f"a mapping from entries of sites: {', '.join(map(str, sites)) or 'none'}"[:200],
            todo='Give tiles={"*": (2, 4, 8)} for an entry "*" of sites.',
        )
    return {name: parse_tile(tile, f"calibration of site {name!r}") for name, tile in tiles.items()}


def check_phases(phases: Any, first: Sites) -> dict[float, dict[str, tuple[Pair, ...]]]:
    """Return the later phases in the order of their progress; they must fit the sites of the first one.

    Raises:
        TypeError, ValueError: as :func:`check_sites`.
        ValueError: no mapping, a start outside (0, 1), other sites or numbers of heads than at the start.
    """
    if not isinstance(phases, Mapping):
        raise _bad_phases(type(phases).__name__)
    later = {_check_start(start): check_sites("phases", sites) for start, sites in phases.items()}
    for sites in later.values():
        if set(sites) != set(first) or any(1 != len(p) != len(first[n]) != 1 for n, p in sites.items()):
            raise _bad_phases("phases that differ in their sites or numbers of heads")
    return dict(sorted(later.items()))


def _check_start(start: Any) -> float:
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not 0 < start < 1:
        raise _bad_phases(f"a phase from {start!r} on")
    return float(start)


def _bad_phases(given: str) -> ValueError:
    return value_error(
        "Calibration: bad phases",
        given=given,
        allowed="for a progress in (0, 1), thresholds for the same sites and heads as at the start",
        todo="Name every site in each phase; (1, 0) is dense.",
    )


AIMS = ("target_error", "target_sparsity", "target_output_error")


def check_aim(aims: Mapping[str, float | None], by: str, mode: str) -> dict[str, Any]:
    """Return an aim as the fields of an ``Origin``; ``aims`` are the values of ``AIMS``, by name.

    Raises:
        ValueError: no aim, several, one outside [0, 1), or a worst sample of the output's error.
    """
    given = {name: value for name, value in aims.items() if value is not None}
    if len(given) != 1:
        raise value_error(
            "a calibration needs one aim",
            given=", ".join(given) or "none",
            allowed=" or ".join(AIMS),
            todo="Give one of them.",
        )
    name, value = next(iter(given.items()))
    least = 0 if name != "target_output_error" else math.ulp(0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1:
        raise value_error(
            f"{name} is out of range",
            given=repr(value),
            allowed="a share in [0, 1), above 0 for the output",
            todo="Give a share, not a percentage: target_error=0.05 allows 5 %, target_sparsity=0.8 skips 80 %.",
        )
    if name == "target_output_error" and by != "mean":
        raise value_error(
            "the error of the output is a mean",
            given=f"by={by!r}",
            allowed="by='mean', the default: over the inputs",
            todo="Leave `by` out; the table says what the worst of the held-out inputs has.",
        )
    return {name: float(value), "by": by, "mode": mode}


def check_influence(influence: Any, sites: Sites, *, target_error: float | None, by: str | None) -> None:
    """Raise a ``ValueError`` unless there is a weight >= 0 for each head of each site, and an aim that uses them."""
    wrong = None
    if target_error is not None:
        wrong = "one with target_error"
    elif by == "worst":
        wrong = 'one with by="worst"; it is a factor of mean errors'
    elif not isinstance(influence, Mapping) or not all(isinstance(each, Sequence) for each in influence.values()):
        wrong = f"{type(influence).__name__} of other things than lists of numbers"
    elif {name: len(each) for name, each in influence.items()} != {name: len(pairs) for name, pairs in sites.items()}:
        wrong = "one for other sites, or for other numbers of heads"
    elif not all(type(x) in (int, float) and 0 <= x < math.inf for each in influence.values() for x in each):
        wrong = "one with a weight that is negative, not finite or no number"
    elif not any(x for each in influence.values() for x in each):
        wrong = "weights that are all 0"
    if wrong is not None:
        raise value_error(
            "the influence of heads does not fit",
            given=wrong,
            allowed="with target_sparsity or target_output_error, a weight >= 0 for each head of each calibrated site",
            todo="Measure it with sparge_compile.head_influence(model, calibration, batches).",
        )
