"""Thresholds for each site and the file that holds them: load, save, look up, validate."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import explain_error

FORMAT = "sparge-calibration"
FORMAT_VERSION = 1
_DOCUMENT_KEYS = {"format", "format_version", "created_by", "sites"}

Pair = tuple[float, float]  # (topk, topp)


def check_pair(topk: float, topp: float, where: str = "thresholds") -> Pair:
    """One head's thresholds, or a ``ValueError`` that says which of them is out of range."""
    for name, value in (("topk", topk), ("topp", topp)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                explain_error(
                    f"{where}: {name} has the wrong type",
                    given=repr(value),
                    allowed="a number",
                    todo=f"Pass {name} as a float.",
                )
            )
    if not 0 < topk <= 1:
        raise ValueError(
            explain_error(
                f"{where}: topk is out of range",
                given=topk,
                allowed="a share of the visible key blocks in (0, 1]",
                todo="Use 1 to keep all of them; at least one block is always kept.",
            )
        )
    if not 0 <= topp <= 1:
        raise ValueError(
            explain_error(
                f"{where}: topp is out of range",
                given=topp,
                allowed="a probability mass in [0, 1]",
                todo="Use 0 to select by topk alone.",
            )
        )
    return float(topk), float(topp)


@dataclass(frozen=True)
class Calibration:
    """Thresholds by site.

    ``sites`` maps a site's name, or a pattern with ``*`` and ``?``, to one (topk, topp) pair for each head. An exact
    name wins over a pattern, an earlier pattern over a later one. A single pair holds for any number of heads.
    """

    sites: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.sites, Mapping):
            raise TypeError(
                explain_error(
                    "Calibration: sites has the wrong type",
                    given=type(self.sites).__name__,
                    allowed="a mapping from site name to (topk, topp) pairs",
                    todo="Load a file with Calibration.load(path), or pass a dict.",
                )
            )
        checked = {name: _check_site(name, pairs) for name, pairs in self.sites.items()}
        object.__setattr__(self, "sites", checked)

    def key_of(self, name: str) -> str | None:
        """The entry that holds for a site: its name, else the first pattern that matches it, else None."""
        return name if name in self.sites else next((p for p in self.sites if fnmatchcase(name, p)), None)

    def lookup(self, name: str, heads: int) -> tuple[Pair, ...] | None:
        """The pairs of a site with so many heads, or None where neither a name nor a pattern covers it."""
        key = self.key_of(name)
        if key is None:
            return None
        pairs = self.sites[key]
        if len(pairs) == 1:
            return pairs * heads
        if len(pairs) != heads:
            raise ValueError(
                explain_error(
                    f"calibration of site {name!r} does not fit the model",
                    given=f"thresholds for {len(pairs)} heads",
                    allowed=f"{heads} pairs, one for each query head, or a single pair",
                    todo="Calibrate this model, or load the file that was made for it.",
                )
            )
        return pairs

    def to_dict(self) -> dict[str, Any]:
        from . import __version__

        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created_by": f"sparge_compile {__version__}",
            "sites": {name: {"thresholds": [list(pair) for pair in pairs]} for name, pairs in self.sites.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the new one, never a part."""
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read a file that :meth:`save` wrote; a stranger is refused with a ``ValueError``."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise _bad_file(path, f"text that is not JSON ({error})") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise _bad_file(path, "JSON without the format name")
        if document.get("format_version") != FORMAT_VERSION:
            raise _bad_file(path, f"format version {document.get('format_version')!r}")
        unknown = sorted(set(document) - _DOCUMENT_KEYS)
        if unknown:
            raise _bad_file(path, f"unknown fields {unknown}")
        sites = document.get("sites")
        if not isinstance(sites, dict):
            raise _bad_file(path, "no table of sites")
        for name, entry in sites.items():
            if not isinstance(entry, dict) or set(entry) != {"thresholds"}:
                raise _bad_file(path, f"site {name!r} without a plain list of thresholds")
        return Calibration({name: entry["thresholds"] for name, entry in sites.items()})


def _bad_file(path: object, given: str) -> ValueError:
    return ValueError(
        explain_error(
            f"{path} is not a calibration file that this version reads",
            given=given,
            allowed=f"{FORMAT} version {FORMAT_VERSION}",
            todo="Write it with Calibration.save, or update sparge_compile if a newer version wrote it.",
        )
    )


def _check_site(name: object, pairs: Any) -> tuple[Pair, ...]:
    where = f"calibration of site {name!r}"
    shape_ok = isinstance(pairs, (list, tuple)) and len(pairs) > 0
    if (
        not isinstance(name, str)
        or not shape_ok
        or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    ):
        raise ValueError(
            explain_error(
                f"{where} cannot be read",
                given=repr(pairs)[:80],
                allowed="a list of (topk, topp) pairs, one for each query head",
                todo="Give one pair for all heads, or one for each.",
            )
        )
    checked = tuple(check_pair(topk, topp, where) for topk, topp in pairs)
    assert not any(math.isnan(x) for pair in checked for x in pair), "NaN passes no comparison above"
    return checked
