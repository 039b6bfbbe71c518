"""A calibration run's finished batches on disk: a folder beside the output with a file for each batch.

Files are written whole or not at all, so a run that was killed goes on where it stopped; processes that share the
batches may share the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import value_error
from ..kernels.order import Tile
from ..thresholds.json_file import write_atomically
from .curves import Sums
from .measuring import Sample
from .record import Batch

_TILES = "tiles.json"


class Folder:
    """The batches of one run. ``settings`` are what the samples depend on."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:16]

    def load(self) -> dict[int, Batch]:
        """Return every batch that is there, by number.

        Raises:
            ValueError: a file of a run with other settings, or one that cannot be read.
        """
        batches = {}
        for path in sorted(self.path.glob("batch-*.pt")):
            try:
                key, batch = _decode(path.read_bytes())
            except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
                raise self._refuse(f"{path.name}, which cannot be read ({type(error).__name__})") from error
            if key != self._key:
                raise self._refuse(f"{path.name} of a run with another model or other settings")
            batches[int(path.stem.removeprefix("batch-"))] = batch
        return batches

    def save(self, number: int, batch: Batch) -> None:
        """Write a batch to a file of its own."""
        write_atomically(self.path / f"batch-{number:06}.pt", _encode(self._key, batch))

    def save_tiles(self, tiles: Mapping[str, Tile | None]) -> None:
        """Write which tiles were chosen."""
        write_atomically(self.path / _TILES, json.dumps({"key": self._key, "tiles": tiles}).encode())

    def load_tiles(self) -> dict[str, Tile | None] | None:
        """Return what :meth:`save_tiles` wrote; None where there is nothing of this run."""
        path = self.path / _TILES
        document = json.loads(path.read_bytes()) if path.exists() else {}
        if document.get("key") != self._key:
            return None
        return {name: None if tile is None else tuple(tile) for name, tile in document["tiles"].items()}

    def remove(self) -> None:
        """Delete the folder, once the result is written."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def _refuse(self, given: str) -> ValueError:
        return value_error(
            f"{self.path} has batches that this run cannot go on from",
            given=given,
            allowed="batches of the same model, settings and version",
            todo="Delete the folder to start anew, or write to another file.",
        )


def _encode(key: str, batch: Batch) -> bytes:
    buffer = io.BytesIO()
    samples = [{**vars(s), "sums": tuple(s.sums), "plain": s.plain and tuple(s.plain)} for s in batch.samples]
    torch.save({"key": key, "steps": batch.steps, "samples": samples}, buffer)
    return buffer.getvalue()


def _decode(content: bytes) -> tuple[str, Batch]:
    document = torch.load(io.BytesIO(content), weights_only=True)
    samples = [
        Sample(**{**s, "sums": Sums(*s["sums"]), "plain": None if s["plain"] is None else Sums(*s["plain"])})
        for s in document["samples"]
    ]
    return document["key"], Batch(samples, document["steps"])
