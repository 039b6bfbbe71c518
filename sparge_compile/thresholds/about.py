"""What a calibration file says of itself, so that others know what it is for: a table of short texts, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import value_error

# What may be said, in the order in which it is printed. docs/calibration.md has the same list.
ABOUT = {
    "model_id": "where the weights are, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "part": "which module of it, as transformer_2",
    "resolution": "of the inputs: frames, height and width in pixels, as 81x480x832; or tokens",
    "scheduler": "of denoising, as UniPCMultistepScheduler",
    "steps": "of denoising, as 50",
    "inputs": "what the model was given, as 8 prompts of VBench",
    "licence": "of the file",
    "note": "anything else, in a sentence",
}
LONGEST = 500  # letters of one text


def check_about(about: Any) -> dict[str, str]:
    """Return what is said, in the order of ``ABOUT``.

    Raises:
        ValueError: no mapping, an unknown name, or a text that is empty, too long, or more than one line.
    """
    if not isinstance(about, Mapping) or not set(about) <= set(ABOUT):
        unknown = sorted(map(str, set(about) - set(ABOUT))) if isinstance(about, Mapping) else about
        raise value_error(
            "Calibration: bad about",
            given=repr(unknown)[:80],
            allowed=f"short texts by name: {', '.join(ABOUT)}",
            todo='As about={"model_id": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "resolution": "81x480x832"}.',
        )
    for name, text in about.items():
        if not isinstance(text, str) or not text.strip() or not text.isprintable() or len(text) > LONGEST:
            raise value_error(
                f"Calibration: bad {name}",
                given=repr(text)[:80],
                allowed=f"one line of at most {LONGEST} letters",
                todo=f"Say {ABOUT[name]}, or leave it out.",
            )
    return {name: about[name].strip() for name in ABOUT if name in about}


def parse_about(entries: Iterable[str]) -> dict[str, str | None]:
    """Read ``name=text`` as the command line has it; an empty text takes a name away.

    Raises:
        ValueError: an entry without ``=``.
    """
    found: dict[str, str | None] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not equals:
            raise value_error(
                "--about",
                given=repr(entry)[:80],
                allowed=f"NAME=TEXT, of the names {', '.join(ABOUT)}",
                todo="As --about model_id=Wan-AI/Wan2.1-T2V-1.3B-Diffusers resolution=81x480x832.",
            )
        found[name] = text or None
    return found
