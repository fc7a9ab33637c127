"""Change the number of steps K of a loaded model; print the time and the loss on a text for each K.

A lower loss does not mean a better model: on the paper's tasks, held-out loss and accuracy gain were anti-correlated.

    python examples/change_steps.py demo/SmolLM2-135M-Instruct-looped
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = (
    "The lighthouse keeper climbed the stairs every evening at the same hour, lit the lamp, and wrote one line about "
    "the weather into a book that nobody else would ever read."
)

if len(sys.argv) != 2:
    sys.exit(__doc__)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = tokenizer(TEXT, return_tensors="pt").input_ids

for steps in (1, 2, 3, 6):
    model.config.loop_steps = steps  # checked immediately; 1 is the base model
    start = time.perf_counter()
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    print(f"steps {steps}: loss {loss:.4f}, {1000 * (time.perf_counter() - start):.0f} ms")

try:
    model.config.loop_steps = 0
except ValueError as error:
    print(f"this failed, as it should: {error}")
