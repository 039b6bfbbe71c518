"""JSON files of ours: read with suspicion, written whole or not at all, with a checksum over what they say.

What a document means is not known here; format names, versions and plain JSON types are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import value_error

CHECKSUM = "checksum"


class Source:
    """A file that was read: where it is, and whether it says something else by now."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self._seen = self._look()
        self._content = _hash_of(self.path)
        self._changed = False

    def has_changed(self) -> bool:
        """Whether there is a file with other contents; a look at its date, unless that is a new one."""
        stamp = self._look()
        if stamp != self._seen:
            self._seen = stamp
            self._changed = stamp is not None and _hash_of(self.path) != self._content
        return self._changed

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _hash_of(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, its folder too; a reader sees the old one or the new one, never a part, even if it is killed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def checksum(document: dict[str, Any]) -> str:
    """Return a hash of a document's contents, however they are laid out; 32 hexadecimal digits."""
    content = {key: value for key, value in document.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def to_text(document: dict[str, Any], table: str) -> str:
    """Return a document as JSON, signed: one line for each field, and one for each entry of the field ``table``."""
    signed = {**document, CHECKSUM: checksum(document)}
    lines = []
    for key, value in signed.items():
        if key == table and value:
            rows = ",\n".join(
                f"  {json.dumps(name)}: {json.dumps(entry, allow_nan=False)}" for name, entry in value.items()
            )
            lines.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: str | os.PathLike[str], name: str, versions: Sequence[int], signed: Sequence[int]) -> dict[str, Any]:
    """Read the document in a file.

    Args:
        name: what its field ``format`` must be.
        versions: the numbers that its field ``format_version`` may have; ``signed``: those that have a checksum.

    Raises:
        OSError: there is no such file.
        ValueError: it is something else, damaged, of another version, or was changed since it was written.
    """

    def refuse(given: str, todo: str = "Write it anew; a copy may have been cut off.") -> ValueError:
        allowed = f"{name} version {' or '.join(map(str, versions))}"
        return value_error(f"{path} is not a file that this version reads", given=given, allowed=allowed, todo=todo)

    try:
        document = json.loads(
            Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise refuse(f"text that is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != name:
        raise refuse("JSON without the format name", "Is it another file?")
    version = document.get("format_version")
    if type(version) is not int or version not in versions:
        raise refuse(f"format version {str(version)[:40]}", "Update sparge_compile if a newer version wrote it.")
    if version in signed:
        if not _finite(document):
            raise refuse("a number too large for a float")
        if document.get(CHECKSUM) != checksum(document):
            raise refuse(
                "contents that do not fit their checksum",
                "It was damaged or edited by hand; write thresholds of your own with Calibration(sites).save(path).",
            )
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands twice")
    return entries


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
