"""Generate with onnxruntime-genai, which knows nothing about loops; prints the tokens, then the text.

    loopexport onnx demo/SmolLM2-135M-Instruct-looped        # once
    python examples/onnx_genai.py demo/SmolLM2-135M-Instruct-looped "Tell me a story about a lighthouse keeper." 64

The last argument, the number of new tokens, is optional.
"""

import json
import sys

import onnxruntime_genai

if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
directory, question, max_new_tokens = (*sys.argv[1:], "64")[:3]
model = onnxruntime_genai.Model(directory)
tokenizer = onnxruntime_genai.Tokenizer(model)
messages = json.dumps([{"role": "user", "content": question}])
prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))

params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + int(max_new_tokens), do_sample=False)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()

answer = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
print(json.dumps(answer))
print(tokenizer.decode(answer))
