"""Extract the language model from a multimodal checkpoint, so that LoopExport can loop it.

python examples/language_model.py gemma-3-4b-it gemma-3-4b-text        # a local checkpoint, a new directory
"""

import shutil
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "LICENSE*")

if len(sys.argv) != 3:
    sys.exit(__doc__)
source, out = map(Path, sys.argv[1:])
whole = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
text.get_decoder().load_state_dict(whole.get_decoder().state_dict())
text.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
text.save_pretrained(out)
for pattern in TOKENIZER_FILES:
    for file in source.glob(pattern):
        shutil.copy(file, out)
print(f"wrote {out}: {type(text).__name__}")
