"""The modules of a model that a calibration's entries mean. In: a model, a calibration. Out: entries by module name.

An entry is a site's name or a pattern; a site is a module and the number of the attention in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .. import ops
from ..errors import value_error
from ..naming import ROOT, numbered
from ..user_model import bare, user_names
from .buffers import Attached
from .calibration import Calibration

Target = tuple[str, int]  # the name of a module, and the number of the attention in it or ``ops.REST``

_ANY_NUMBER = 10**9  # as the number of a site: one that only patterns name
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by the names that sites have."""
    return {name or ROOT: module for _, name, module in user_names(bare(model))}


def site_name(target: Target) -> str:
    """Return a target's name as an entry of a calibration; ``#*`` stands for all attentions without their own."""
    name, index = target
    return f"{name}#*" if index == ops.REST else numbered(name, index)


def is_exact(entry: str) -> bool:
    """Whether an entry is a site's name, and no pattern."""
    return not any(letter in entry for letter in "*?[")


def find_targets(model: nn.Module, calibration: Calibration) -> dict[Target, str]:
    """Return each attention that a calibration names, with the entry that holds for it.

    Raises:
        ValueError: an entry fits no module; the message lists names that are near.
    """
    modules = {name: module for name, module in modules_of(model).items() if _may_hold_attention(module)}
    # A second and third attention are known by the entries that name them; for all others there may be a pattern.
    numbers = {int(end) for _, _, end in (entry.rpartition("#") for entry in calibration.sites) if end.isdigit()}
    targets: dict[Target, str] = {}
    for name in modules:
        for index in (0, *sorted(numbers - {0}), ops.REST):
            site = site_name((name, index)) if index != ops.REST else numbered(name, _ANY_NUMBER)
            entry = calibration.key_of(site)
            # What a pattern says of all further attentions needs no buffer for each.
            if entry is not None and (index < 1 or entry == site or entry.endswith(f"#{index}")):
                targets[name, index] = entry
    used = set(targets.values())
    missed = [entry for entry in calibration.sites if entry not in used and not _is_shadowed(entry, modules)]
    if missed or not targets:
        raise value_error(
            "attach: thresholds for modules that the model does not have",
            given=", ".join(map(repr, missed)) or "an empty calibration",
            allowed=f"modules that may compute attention, as {', '.join(near_names(missed, modules)) or 'none here'}",
            todo="sparge_compile.explain(model)(...) lists the sites.",
        )
    return targets


def _may_hold_attention(module: nn.Module) -> bool:
    """Whether a pattern means this module: the user's own ones, which may compute attention in their forward."""
    if isinstance(module, (nn.MultiheadAttention, Attached)):
        return isinstance(module, nn.MultiheadAttention)
    return not isinstance(module, _CONTAINERS) and not type(module).__module__.startswith("torch.nn.")


def _is_shadowed(entry: str, names: Iterable[str]) -> bool:
    """Whether a pattern does match modules, and only those that other entries name."""
    return not is_exact(entry) and fits_module(entry, names)


def fits_module(entry: str, names: Iterable[str]) -> bool:
    """Whether an entry is the name or a pattern of one of these modules, or of a site in it."""
    return any(fnmatchcase(name, entry.partition("#")[0]) for name in names)


def near_names(missed: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that are like those of some entries; if there are none, a few of all."""
    names = list(names)
    close = [
        near for entry in missed for near in difflib.get_close_matches(entry.partition("#")[0], names, n=3, cutoff=0.4)
    ]
    return list(dict.fromkeys(close)) or names[:8]
