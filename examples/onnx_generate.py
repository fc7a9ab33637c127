"""Generate with ONNX Runtime alone: no torch, no LoopExport.

    loopexport onnx demo/SmolLM2-135M-Instruct-looped        # once
    python examples/onnx_generate.py demo/SmolLM2-135M-Instruct-looped "Tell me a story about a lighthouse keeper." 64

The last argument, the number of new tokens, is optional.
"""

import sys

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
directory, question, max_new_tokens = (*sys.argv[1:], "64")[:3]
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
messages = [{"role": "user", "content": question}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
ids = np.array([tokenizer(text, add_special_tokens=False).input_ids])

session = onnxruntime.InferenceSession(f"{directory}/model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
past = {
    each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
    for each in session.get_inputs()
    if each.name.startswith("past_key_values.")
}
optional = {each.name for each in session.get_overridable_initializers()}
last_only = {"num_logits_to_keep": np.array(1)} if "num_logits_to_keep" in optional else {}
total, answer = 0, []
for _ in range(int(max_new_tokens)):
    positions, total = np.arange(total, total + ids.shape[1])[None], total + ids.shape[1]
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), "position_ids": positions}
    logits, *present = session.run(names, {**feeds, **last_only, **past})
    past = dict(zip(past, present, strict=True))
    ids = logits[:, -1:].argmax(-1)
    if ids.item() == tokenizer.eos_token_id:
        break
    answer.append(ids.item())
print(tokenizer.decode(answer, skip_special_tokens=True))
