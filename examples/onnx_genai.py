"""Chat with onnxruntime-genai, which knows nothing about loops; prints the tokens of each answer, then its text.

    loopexport onnx demo/SmolLM2-135M-Instruct-looped        # once
    python examples/onnx_genai.py demo/SmolLM2-135M-Instruct-looped "Tell me a story." "And another one?" 64

The last argument, the number of new tokens in an answer, is optional.
"""

import json
import sys

import onnxruntime_genai

if len(sys.argv) < 3:
    sys.exit(__doc__)
directory, *questions = sys.argv[1:]
max_new_tokens = int(questions.pop()) if len(questions) > 1 and questions[-1].isdigit() else 64
model = onnxruntime_genai.Model(directory)
tokenizer = onnxruntime_genai.Tokenizer(model)
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=2048, do_sample=False)  # of the whole chat
generator = onnxruntime_genai.Generator(model, params)

messages, so_far = [], ""
for question in questions:
    messages.append({"role": "user", "content": question})
    chat = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    if so_far and not generator.is_done():  # cut at max_new_tokens: its last token has not run
        generator.get_logits()  # runs it; without this, the next line would lose it
    generator.append_tokens(tokenizer.encode(chat[len(so_far) :]))
    start = len(generator.get_sequence(0))
    for _ in range(max_new_tokens):
        if generator.is_done():
            break
        generator.generate_next_token()
    answer = [int(token) for token in generator.get_sequence(0)[start:]]
    text = tokenizer.decode(answer)
    print(json.dumps(answer))
    print(text)
    messages.append({"role": "assistant", "content": text})
    so_far = chat + text
