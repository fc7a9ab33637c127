"""Make ONNX graphs of several K over the same weights, from one trace, and compare their loss and time.

python examples/onnx_steps.py demo/SmolLM2-135M-Instruct-looped 2 3 6
"""

import sys
import time

import numpy as np

import loopexport

if len(sys.argv) < 3:
    sys.exit(__doc__)
directory, *steps = sys.argv[1:]
plan = loopexport.plan_onnx(directory, steps=tuple(map(int, steps)))
outcome = plan.apply(verify=False)

text = "It was a bright cold day in April, and the clocks were striking thirteen."
for name, spec in plan.graphs.items():
    model = loopexport.OnnxModel(directory, name)
    ids = np.array([model.tokenizer(text).input_ids])
    start = time.perf_counter()
    logits, _ = model.forward(ids)
    seconds = time.perf_counter() - start
    shifted = logits[0, :-1] - logits[0, :-1].max(-1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, ids[0, 1:, None], -1)[:, 0]
    print(f"K = {spec.steps}: loss {loss.mean():.4f} nats a token, {1000 * seconds:.0f} ms for {ids.shape[1]} tokens")

written = sum(path.stat().st_size for path in outcome.root.glob("*.onnx_data"))
print(f"weights written: {written} bytes")
