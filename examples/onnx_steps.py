"""Make ONNX graphs of several K over the same weights, from one trace, and compare their loss and time.

python examples/onnx_steps.py demo/SmolLM2-135M-Instruct-looped 2 3 6
"""

import sys
import time

import numpy as np

import loopexport
from loopexport.export.onnx_files import graph_name

if len(sys.argv) < 3:
    sys.exit(__doc__)
directory, *steps = sys.argv[1:]
own_steps = loopexport.open_export(directory).spec.steps
outcome = loopexport.export_onnx(directory, steps=tuple(map(int, steps)), verify=False)

text = "It was a bright cold day in April, and the clocks were striking thirteen."
for k in map(int, steps):
    model = loopexport.OnnxModel(directory, graph_name(k, own_steps))
    ids = np.array([model.tokenizer(text).input_ids])
    start = time.perf_counter()
    logits, _ = model.forward(ids)
    seconds = time.perf_counter() - start
    shifted = logits[0, :-1] - logits[0, :-1].max(-1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, ids[0, 1:, None], -1)[:, 0]
    print(f"K = {k}: loss {loss.mean():.4f} nats a token, {1000 * seconds:.0f} ms for {ids.shape[1]} tokens")

written = sum(path.stat().st_size for path in outcome.root.glob("*.onnx_data"))
print(f"weights written: {written} bytes")
