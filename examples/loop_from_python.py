"""Plan, convert and verify from Python, and catch an error.

python examples/loop_from_python.py demo/SmolLM2-135M-Instruct demo/looped-from-python
"""

import sys

import loopexport

if len(sys.argv) != 3:
    sys.exit(__doc__)
model, out = sys.argv[1:]

plan = loopexport.plan_convert(model, out, span=(13, 17), steps=3, overwrite=True)
print(f"{len(plan.spec.layers)} layers, {plan.cost.multiplier:.2f}x the layer evaluations of the base")

export = plan.apply()
print(f"{export.root} was made from {export.manifest.base.name}, weights by {export.manifest.weights_method}")

for check in loopexport.verify(export.root):
    print("passed" if check.passed else "FAILED", check.name, check.difference)

try:
    loopexport.convert(model, out, span=(13, 99), steps=3)
except loopexport.LoopExportError as error:
    print(f"this failed, as it should: {error}")
