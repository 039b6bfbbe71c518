"""A small model: which of its attentions become sparse, why not the others, and what the thresholds do to its output.

    python examples/02_model_report.py

``topk`` is the share of the key blocks that each query block reads, ``topp`` the share of the probability mass that
they hold; the larger set of the two counts. Without ``min_seq_len``, a cost model lets only those sites be sparse that
it predicts to be faster; with it, all that have so many keys.
"""

import torch
from tabulate import tabulate
from video_model import VideoModel, clip, relative_error

import sparge_compile

torch.manual_seed(0)
model, inputs = VideoModel().eval(), clip(seed=0)
report = sparge_compile.explain(model, {"topk": 0.25, "topp": 0.0})(*inputs)
print(report)

rows = []
with torch.no_grad():
    dense = model(*inputs)
    for topk, topp in ((0.05, 0.0), (0.25, 0.0), (0.5, 0.0), (0.05, 0.5), (0.05, 0.8), (0.05, 0.95)):
        options = {"topk": topk, "topp": topp, "min_seq_len": 1024, "inner": "eager"}
        sparse = torch.compile(model, backend="sparge", options=options)(*inputs)
        rows.append((topk, topp, relative_error(sparse, dense)))
print()
print(tabulate(rows, headers=("topk", "topp", "relative error"), floatfmt=(".2f", ".2f", ".1%")))
