"""Loop a model of the Hub with a preset and publish the result; the weights never pass through this machine.

The Hub copies them from the model's repository. You need a token with write permission (`hf auth login` or HF_TOKEN).

    python examples/publish.py Qwen/Qwen3-4B-Instruct-2507 YOUR_NAME/qwen3-4b-looped qwen3-4b-mmlu-pro

`loopexport presets list` prints all presets.
"""

import sys
import tempfile
from pathlib import Path

import loopexport

if len(sys.argv) != 4:
    sys.exit(__doc__)
model, repo_id, preset = sys.argv[1:]

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "looped"
    try:
        plan = loopexport.plan_convert(model, out, preset=preset, weights="none")
        print(*plan.warnings, sep="\n")
        export = plan.apply()
        result = loopexport.push(out, repo_id, commit_message=f"Looped with preset {preset}")
    except loopexport.LoopExportError as error:
        sys.exit(f"Not published: {error}")

print(f"{export.manifest.base.name} at {export.manifest.base.revision}, looped with preset {preset}")
for file in result.transfers:
    print(f"{file.how:8}  {file.size:>13,}  {file.name}")
print(f"Published as {result.url}, commit {result.commit}")
