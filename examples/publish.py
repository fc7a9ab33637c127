"""Loop a model of the Hub and publish the result, while its weights never pass through this machine.

The Hub copies them from the model's repository; a token with write permission is needed (`hf auth login`, or HF_TOKEN).

    python examples/publish.py MODEL REPO_ID START:STOP STEPS
"""

import sys
import tempfile
from pathlib import Path

import loopexport

model, repo_id, span, steps = sys.argv[1:]

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "looped"
    try:
        export = loopexport.convert(model, out, span=span, steps=int(steps), weights="none")
        result = loopexport.push(out, repo_id, commit_message=f"Layers {span}, {steps} steps")
    except loopexport.LoopExportError as error:
        sys.exit(f"Not published: {error}")

print(f"{export.manifest.base.name} at {export.manifest.base.revision}, layers {span} applied {steps} times")
for file in result.transfers:
    print(f"{file.how:8}  {file.size:>13,}  {file.name}")
print(f"Published as {result.url}, commit {result.commit}")
