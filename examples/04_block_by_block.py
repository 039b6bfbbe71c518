"""Block by block: equal blocks share one compiled graph, and each runs it with thresholds of its own.

    python examples/04_block_by_block.py

``attach`` puts the thresholds on the model as buffers. They are read at run time, so that new values take effect at the
next call, and nothing is compiled anew.
"""

import torch
from torch._dynamo.utils import counters
from video_model import VideoModel, clip, relative_error

import sparge_compile

torch.manual_seed(0)
model, inputs = VideoModel(layers=4).eval(), clip(seed=0)
with torch.no_grad():
    dense = model(*inputs)

    attached = sparge_compile.attach(model, sparge_compile.Calibration({"blocks.*.attn1": [(0.05, 0.0)]}))
    for block in model.blocks:
        block.compile(backend="sparge", fullgraph=True, options={"min_seq_len": 1024, "inner": "eager"})
    errors = {"topk 0.05 in all blocks": relative_error(model(*inputs), dense)}
    graphs = counters["stats"]["unique_graphs"]
    print(f"{len(model.blocks)} blocks, compiled graphs: {graphs}")

    with torch.compiler.set_stance("fail_on_recompile"):
        attached.set(topk=0.25)
        errors["topk 0.25 in all blocks"] = relative_error(model(*inputs), dense)
        attached.set(sparge_compile.Calibration({"blocks.0.attn1": [(1.0, 0.0)]}))
        errors["… and all key blocks in the first"] = relative_error(model(*inputs), dense)
for setting, error in errors.items():
    print(f"{setting}: relative error {error:.1%}")
