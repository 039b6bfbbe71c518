"""The table of gallery/README.md: a row for each calibration in this folder.

python gallery/table.py            # print it
python gallery/table.py --write    # put it into README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from tabulate import tabulate

from sparge_compile import Calibration

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "README.md"
BEGIN, END = "<!-- files: python gallery/table.py --write -->\n", "<!-- end -->"


def files() -> list[Path]:
    """The calibrations, by folder and name."""
    return sorted(FOLDER.glob("*/*.json"))


def row(path: Path) -> tuple[str, ...]:
    """File, model, resolution, aim, sparsity, mean error of heads, order of tokens."""
    calibration = Calibration.load(path)
    about, origin, total = calibration.about, calibration.origin, calibration.summary()
    aim, skipped, error = "", "", ""
    if origin is not None and total is not None:
        aims = {
            "error of heads": origin.target_error,
            "sparsity": origin.target_sparsity,
            "error of the output": origin.target_output_error,
        }
        aim = next(f"{name} {value:g}" for name, value in aims.items() if value is not None)
        skipped, error = f"{total.sparsity:.1%}", f"{total.mean_error:.3f}"
    tiles = {"×".join(map(str, tile)) for tile in calibration.tiles.values()}
    link = f"[{path.stem}]({path.relative_to(FOLDER).as_posix()})"
    model = " ".join(filter(None, (f"`{about['model_id']}`", about.get("part"))))
    return link, model, about["resolution"], aim, skipped, error, ", ".join(sorted(tiles)) or "raster"


def table() -> str:
    """The table as markdown."""
    headers = ("file", "model", "resolution", "aim", "sparsity", "error", "blocks")
    return tabulate(map(row, files()), headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def main() -> None:
    """Print the table, or write it."""
    if sys.argv[1:] != ["--write"]:
        print(table(), end="")
        return
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1], "utf-8")


if __name__ == "__main__":
    main()
