"""The tables of the large model: its arms, a student taken apart, times. In: rows. Out: Markdown."""

from __future__ import annotations

import statistics

from case import LATE
from tabular import MEASURES, RULES, Row, grouped, markdown, numbers, shown, where

LOSSES = {"flow": "plain loss", "guided": "guided loss"}


def arms_table(quality: list[Row]) -> str:
    """The large model's arms: by sparsity, then by how long they were trained."""
    rows = where(quality, part="arms")
    columns = ("target", "steps", "order", "rule", "thresholds", "loss", "trained", "rate", "anneal", "outputs")
    kinds = {tuple(row[name] for name in columns): None for row in rows}
    lines = []
    for kind in sorted(kinds, key=lambda kind: (float(kind[0]), int(kind[1]))):
        named = dict(zip(columns, kind, strict=True))
        words = [f"{float(named['target']):.0%}", named["order"], RULES[named["rule"]], named["thresholds"]]
        if named["steps"] == "0":
            words.append("not trained")
        else:
            words += [f"{named['steps']} steps", named["trained"], f"rate {named['rate']}"]
            if named["loss"] in LOSSES:
                words.append(LOSSES[named["loss"]])
            words += [f"{name} {named[name]}" for name in ("anneal", "outputs") if named[name] != "0"]
        of = where(rows, **named)
        lines.append([", ".join(words), *(shown(of, m) for m in ("sparsity", *MEASURES))])
    others = {}
    for kind, same in grouped(where(quality, part="shipped"), "thresholds").items():
        late = f", {kind.replace('by step', LATE)}" if "by step" in kind else ""
        for target, of in grouped(same, "target").items():
            words = "trained on from it" if others else "the student of the repository"
            others[f"{float(target):.0%}{late}, {words}"] = of
    others["dense"] = where(quality, part="floor", rule="dense")
    lines += [[name, *(shown(of, m) for m in ("sparsity", *MEASURES))] for name, of in others.items() if of]
    return markdown(("", "sparsity", *MEASURES), lines)


def apart_table(rows: list[Row]) -> str:
    """Where a student's error is; what restores the most of it comes first among layers and heads."""
    lines = []
    for student, of in grouped(rows, "student").items():
        for what, each in grouped(of, "what").items():
            found = {which: statistics.mean(numbers(some, "value")) for which, some in grouped(each, "which").items()}
            names = list(found)
            if what in ("layer", "head"):
                names = ["all", *sorted((name for name in names if name != "all"), key=found.__getitem__)[:8]]
            lines.append([student, what, ", ".join(f"{name}: {found[name]:.4f}" for name in names)])
    return markdown(("student", "by", "velocity error, by steps digits read"), lines)


def timing_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        dense, sparse = float(row["dense ms"]), float(row["sparse ms"])
        kind = f"{row['what']}, {float(row['target']):.0%}, {row['order']}"
        lines.append(
            [
                kind,
                row["device"],
                f"{float(row['sparsity']):.1%}",
                f"{dense:.2f}",
                f"{sparse:.2f}",
                f"{dense / sparse:.2f}",
            ]
        )
    return markdown(("", "device", "sparsity", "dense ms", "sparse ms", "ratio"), lines)
