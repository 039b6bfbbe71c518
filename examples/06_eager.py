"""Attention that is in no graph: measured and made sparse in eager code.

    python examples/06_eager.py

The blocks of this model switch compilation off, as some official repositories do, so ``torch.compile`` finds nothing to
replace in them. ``replace_attention`` takes the calls of attention one by one.
"""

import torch
from video_model import VideoModel, clip, relative_error

import sparge_compile

torch.manual_seed(0)
model, inputs = VideoModel(layers=2).eval(), clip(seed=0)
for block in model.blocks:
    block.forward = torch.compiler.disable(block.forward)

options = {"min_seq_len": 1024}
calibration = sparge_compile.calibrate(model, [inputs], target_sparsity=0.7, options=options)
print(calibration.table())

with torch.no_grad():
    dense = model(*inputs)
    with sparge_compile.replace_attention(model, options, calibration=calibration) as replaced:
        error = relative_error(model(*inputs), dense)
    report = replaced.report
print(report)
print(f"relative error of the output: {error:.1%}")
