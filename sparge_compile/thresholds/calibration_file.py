"""A calibration as a JSON document and back. In and out: thresholds by site and phase, and where they come from.

Version 1 is a table of sites and nothing else, and may be written by hand. A file has the lowest version whose readers
know all that it says: 2, 3 where tokens are kept, 4 where the model's output was asked or something is dense by plan, 5
where sites have tiles, 6 where it says what it is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import value_error
from ..keeping import Kept
from ..kernels.order import TILE, Tile
from ..pair import Sites
from ..schedule import ALWAYS_SPARSE, Schedule
from ..version import __version__
from . import json_file
from .measured import Origin
from .site_curves import SiteCurves

FORMAT = "sparge-calibration"
FORMAT_VERSION = 2
_PLAIN_VERSION, _KEPT_VERSION, _ASKED_VERSION, _TILES_VERSION, _ABOUT_VERSION, _MOVED_VERSION = 1, 3, 4, 5, 6, 7
_VERSIONS = (_PLAIN_VERSION, FORMAT_VERSION, *range(_KEPT_VERSION, _MOVED_VERSION + 1))
_FIELDS = {
    1: {"format", "format_version", "created_by", "sites"},
    2: {"format", "format_version", "created_by", "phases", "origin", "sites", json_file.CHECKSUM},
}


class Contents(NamedTuple):
    """The fields of a ``Calibration`` as a file has them, with lists for pairs; thresholds are not checked yet."""

    sites: Mapping[str, Any]
    phases: Mapping[float, Mapping[str, Any]]
    origin: Origin | None
    kept: Mapping[str, Any]
    tiles: Mapping[str, Any] = MappingProxyType({})
    schedule: Mapping[str, Any] = MappingProxyType({})
    about: Mapping[str, Any] = MappingProxyType({})


def to_document(
    phases: Mapping[float, Sites],
    origin: Origin | None,
    kept: Mapping[str, Kept],
    tiles: Mapping[str, Tile],
    schedule: Schedule,
    about: Mapping[str, str],
) -> dict[str, Any]:
    """Return the document, without its checksum. ``phases`` are all, by the progress they hold from; the first is 0."""
    return {
        "format": FORMAT,
        "format_version": _version(origin, kept, tiles, schedule, about),
        "created_by": f"sparge_compile {__version__}",
        **({"about": dict(about)} if about else {}),
        "phases": list(phases),
        **({"schedule": schedule.to_dict()} if schedule != ALWAYS_SPARSE else {}),
        "origin": None if origin is None else origin.to_dict(),
        "sites": {
            name: {
                "thresholds": [[list(pair) for pair in sites[name]] for sites in phases.values()],
                **({} if origin is None else origin.curves[name].to_dict()),
                **({"kept": _kept_entry(kept[name])} if name in kept else {}),
                **({"tile": list(tiles[name])} if name in tiles else {}),
            }
            for name in phases[0.0]
        },
    }


def _version(
    origin: Origin | None,
    kept: Mapping[str, Kept],
    tiles: Mapping[str, Tile],
    schedule: Schedule,
    about: Mapping[str, str],
) -> int:
    if any(len(tile) > len(TILE) for tile in tiles.values()):
        return _MOVED_VERSION
    if about:
        return _ABOUT_VERSION
    if tiles:
        return _TILES_VERSION
    if schedule != ALWAYS_SPARSE or (origin is not None and origin.output is not None):
        return _ASKED_VERSION
    return _KEPT_VERSION if kept else FORMAT_VERSION


def write(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Sign a document and write it; a reader sees the old file or the new one, never a part."""
    json_file.write_atomically(path, json_file.to_text(document, "sites").encode())


def read(path: str | os.PathLike[str]) -> Contents:
    """Return what a file says.

    Raises:
        OSError: there is no such file.
        ValueError: it is another file, damaged, changed by hand, or of another version.
    """
    document = json_file.read(path, FORMAT, _VERSIONS, _VERSIONS[1:])
    version = document["format_version"]
    wrong = set(document) ^ _FIELDS[min(version, FORMAT_VERSION)]
    if version == _PLAIN_VERSION:
        wrong -= {"created_by"}
    if version >= _ASKED_VERSION:
        wrong -= {"schedule"}
    if version >= _ABOUT_VERSION:
        wrong -= {"about"}
    if wrong:
        raise _refusal(path, f"unknown or missing fields {sorted(wrong)}")
    sites = document["sites"]
    if not isinstance(sites, dict):
        raise _refusal(path, "no table of sites")
    with refusing(path):
        if version == _PLAIN_VERSION:
            return Contents({name: _only(entry, "thresholds") for name, entry in sites.items()}, {}, None, {})
        return _parse(document, sites)


@contextmanager
def refusing(path: object) -> Iterator[None]:
    """Turn each error that wrong contents cause into a ``ValueError`` that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _refusal(path, str(error) or type(error).__name__) from error


def _parse(document: dict[str, Any], sites: dict[str, Any]) -> Contents:
    """Read a document of the present version; an error of any type that ``refusing`` knows, where it is none."""
    starts = document["phases"]
    if not isinstance(starts, list) or not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError("phases that do not ascend from 0")
    has_curves, curves = document["origin"] is not None, {}
    kept, sites = _taken_out(sites, "kept", document["format_version"] >= _KEPT_VERSION)
    tiles, sites = _taken_out(sites, "tile", document["format_version"] >= _TILES_VERSION)
    for name, entry in sites.items():
        if has_curves:
            curves[name] = SiteCurves.from_dict({k: v for k, v in entry.items() if k != "thresholds"}, name)
        rows = entry["thresholds"] if has_curves else _only(entry, "thresholds")
        if not isinstance(rows, list) or len(rows) != len(starts):
            raise ValueError(f"site {name!r} without thresholds for each of {len(starts)} phases")
    first, *later = ({name: entry["thresholds"][i] for name, entry in sites.items()} for i in range(len(starts)))
    origin = Origin.from_dict(document["origin"], curves) if has_curves else None
    phases = dict(zip(starts[1:], later, strict=True))
    beside = (document.get(field, {}) for field in ("schedule", "about"))
    return Contents(first, phases, origin, kept, tiles, *beside)


def _taken_out(sites: dict[str, Any], field: str, known: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A field of the sites that have it, where a version knows it, and the sites without it."""
    found = {name: entry[field] for name, entry in sites.items() if field in entry} if known else {}
    return found, {
        name: {k: v for k, v in entry.items() if k != field} if name in found else entry
        for name, entry in sites.items()
    }


def _kept_entry(kept: Kept) -> dict[str, Any]:
    keys = list(kept.keys) if isinstance(kept.keys, tuple) else kept.keys
    return {"keep_keys": keys, "dense_queries": kept.dense_queries}


def _only(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict) or set(entry) != {key}:
        raise ValueError(f"a site with other fields than {key!r}")
    return entry[key]


def _refusal(path: object, given: str) -> ValueError:
    return value_error(
        f"{path} is not a calibration file that this version reads",
        given=given,
        allowed=f"{FORMAT} version {', '.join(map(str, _VERSIONS[:-1]))} or {_VERSIONS[-1]}",
        todo="Write it with Calibration.save, or update sparge_compile if a newer version wrote it.",
    )
