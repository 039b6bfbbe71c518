"""Thresholds for each head, measured on a few inputs, kept in a file, and used from there.

    python examples/03_calibrate.py

Some heads need nearly all key blocks and some need few: one bound on the error gives each what it needs. The same from
a shell: ``sparge calibrate --model … --inputs … --out model.json``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tabulate import tabulate
from video_model import VideoModel, clip, relative_error

import sparge_compile

torch.manual_seed(0)
model, unseen = VideoModel().eval(), clip(seed=99)
options = {"min_seq_len": 1024, "inner": "eager"}  # every site with so many keys is sparse, whether it pays here or not
with TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder) / "model.json"
    sparge_compile.calibrate(model, [clip(seed) for seed in range(4)], target_error=0.05, options=options, out=file)
    calibration = sparge_compile.Calibration.load(file)
    print(calibration.table())
    dense = model(*unseen)
    compiled = torch.compile(model, backend="sparge", options={**options, "calibration": file})
    error = relative_error(compiled(*unseen), dense)
    print(f"\nrelative error of the model on an unseen clip: {error:.2%}")

    rows = []
    for sparsity in (0.6, 0.75, 0.9):  # another aim needs no other run of the model
        aimed = calibration.at(target_sparsity=sparsity)
        compiled = torch.compile(model, backend="sparge", options={**options, "calibration": aimed})
        rows.append((sparsity, aimed.summary().sparsity, relative_error(compiled(*unseen), dense)))
print()
print(tabulate(rows, headers=("sparsity wanted", "reached", "relative error"), floatfmt=(".0%", ".1%", ".2%")))
