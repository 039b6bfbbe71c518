"""One attention layer, compiled: what is found in it, and how near the sparse result comes to the dense one.

    python examples/01_one_layer.py

Each query block reads the tenth of the key blocks that fits it best, and more until they hold 20 % of its attention.
"""

import torch
import torch.nn.functional as F

import sparge_compile


def layer(x):
    return F.scaled_dot_product_attention(x, x, x)


torch.manual_seed(0)
x = 2 * F.interpolate(torch.randn(4, 32, 64), 4096, mode="linear").mT[None]  # [B, H, L, D]; near tokens are alike

options = {"topk": 0.1, "topp": 0.2, "inner": "eager"}  # "eager" starts at once; leave it out, and Inductor compiles
report = sparge_compile.explain(layer, options)(x)  # a dry run: what would be replaced, and why
print(report)

compiled = torch.compile(layer, backend="sparge", options=options)
dense, sparse = layer(x), compiled(x)
error = float((sparse - dense).abs().sum() / dense.abs().sum())
print(f"relative error of the sparse result: {error:.2%}")
