"""Ask a server a question with the `openai` client.

python examples/serve_vllm/ask.py http://127.0.0.1:8000/v1 "What is the capital of France?"
"""

import sys

from openai import OpenAI

if len(sys.argv) != 3:
    sys.exit(__doc__)
url, question = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none")
answer = client.chat.completions.create(
    model="looped", messages=[{"role": "user", "content": question}], max_tokens=40, temperature=0
)
print(answer.choices[0].message.content)
