"""How to load an export, for its card: a section for each runtime."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from loopexport.base.families import is_multimodal
from loopexport.loop.route import cache_slots
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.templates.looped_mlx_limits import MLX_LM
from loopexport.templates.looped_spec import as_json
from loopexport.templates.looped_vllm_limits import VLLM_QUANTISED, vllm_context, vllm_flags, vllm_refusal

from .foreign_text import javascript_literal, markdown_code, markdown_text, python_literal
from .manifest import OnnxRecord
from .onnx_files import GENAI_CONFIG, graph_name, steps_in_name
from .quantisation import read_cost

TASK = re.compile(r"[a-z]+(-[a-z]+)*")  # the form of the names of tasks on the Hub

# Lines of the examples that `on_the_hub` replaces, in cards of earlier versions too: do not change them.
LOCAL_PATH = 'path = "."  # this directory, or its Hub id\n'
LOCAL_SNAPSHOT = '\npath = "."  # this directory, or what snapshot_download gives for its Hub id\n'
LOCAL_ID = 'const id = "NAMESPACE/NAME";  // on the Hub\n'


def on_the_hub(card: str, repo_id: str) -> str:
    """The card with `repo_id` in its examples instead of a local path."""
    snapshot = f'from huggingface_hub import snapshot_download\n\npath = snapshot_download("{repo_id}")\n'
    lines = {
        LOCAL_PATH: f'path = "{repo_id}"\n',
        LOCAL_SNAPSHOT: snapshot,
        LOCAL_ID: f'const id = "{repo_id}";\n',
    }
    for local, published in lines.items():
        card = card.replace(local, published)
    return card


def text_section(spec: LoopSpec, tokenizer: str | None, trained: bool, config: dict) -> str:
    """The section for transformers and text alone, as input of any model.

    Args:
        spec: the loop.
        tokenizer: the Python expression to load the tokenizer from; None if the base had none.
        trained: whether the weights were trained since the conversion.
        config: the base's config.
    """
    auto = _sample(config)["auto"] if is_multimodal(config) else "AutoModelForCausalLM"
    if tokenizer is None:
        names, line = auto, "# The base's directory had no tokenizer: this model takes token ids."
    else:
        names = f"{auto}, AutoTokenizer"
        line = f"tokenizer = AutoTokenizer.from_pretrained({tokenizer}, trust_remote_code=True)"
    return f"""\
```python
from transformers import {names}

{LOCAL_PATH}{line}
model = {auto}.from_pretrained(path, trust_remote_code=True)
{_steps_line(spec, trained)}
```
"""


def multimodal_section(spec: LoopSpec, config: dict, trained: bool) -> str:
    """The section for transformers and a model that reads images or sound too.

    Args:
        spec: the loop.
        config: the base's config.
        trained: whether the weights were trained since the conversion.
    """
    return _MULTIMODAL.format(path=LOCAL_PATH, steps=_steps_line(spec, trained), **_sample(config))


def _steps_line(spec: LoopSpec, trained: bool) -> str:
    """The line of an example that changes K."""
    one = "the model without its loop" if trained else "the base model"
    if spec.path is not None:
        return f"model.config.loop_steps = 2  # the path; 1 is {one}"
    return f"model.config.loop_steps = {as_json(spec.steps)}  # change it at any time; 1 is {one}"


def pipeline_tag(config: dict, base_card: Mapping) -> str:
    """The task of an export on the Hub.

    Args:
        config: the base's config.
        base_card: the metadata of the base's card, which name the task of a multimodal model.
    """
    if not is_multimodal(config):
        return "text-generation"
    task = base_card.get("pipeline_tag")
    if isinstance(task, str) and TASK.fullmatch(task):
        return task
    if not _reads_images(config):
        return "audio-text-to-text"
    return "any-to-any" if _reads_sound(config) else "image-text-to-text"


def _sample(config: dict) -> dict[str, str]:
    """The Auto class of a multimodal model, and what its example asks about."""
    return _IMAGE if _reads_images(config) else _SOUND


def _reads_sound(config: dict) -> bool:
    return any(isinstance(config.get(key), dict) for key in ("audio_config", "codec_config"))


def _reads_images(config: dict) -> bool:
    return isinstance(config.get("vision_config"), dict) or not _reads_sound(config)


def onnx_section(files: Mapping[str, OnnxRecord], num_layers: int) -> str:
    """The section for ONNX Runtime and the libraries on top of it; empty without graphs.

    Args:
        files: the ONNX files of the export, by name.
        num_layers: the base's number of decoder layers.
    """
    graphs = {name: record for name, record in files.items() if record.steps is not None}
    if not graphs:
        return ""
    name = min(graphs, key=_rank)
    option = "" if name == graph_name(1, 1) or len(graphs) == 1 else f" --file {shlex.quote(name)}"
    command = markdown_code(f'loopexport run DIRECTORY "Hello"{option}')
    parts = [_graphs_table(graphs), _RUN.format(path=LOCAL_SNAPSHOT, name=python_literal(name), command=command)]
    if GENAI_CONFIG in files:  # it exists only if all cache slots have one shape, which these libraries assume
        parts += [_GENAI, _OPTIMUM.format(name=python_literal(name))]
        small = _quantised_graph(graphs) or name
        if graphs[small].attention == "portable":  # fused attention crashes Node with a segmentation fault
            parts.append(_transformers_js(small, graphs[small], num_layers))
    return "\n".join(parts)


def vllm_section(family: str, spec: LoopSpec, config: dict, quantisation: str | None) -> str:
    """The section for vLLM; empty if it refuses to serve the loop, or if this way to quantise was not tested."""
    if quantisation not in (None, *VLLM_QUANTISED) or vllm_refusal(family, spec, config):
        return ""
    context = vllm_context(config)
    length = () if context is None else (f"--max-model-len {context}",)
    return _VLLM.format(options="".join(f" {each}" for each in (*length, *vllm_flags(spec))))


def mlx_section(steps: int | list[int]) -> str:
    """The section for mlx-lm.

    Args:
        steps: K.
    """
    return _MLX.format(steps=steps, release=MLX_LM)


def _rank(name: str) -> tuple[bool, bool, str]:
    """Which graph to show: `model.onnx`, then one of the export's own K, then any."""
    return name != graph_name(1, 1), steps_in_name(name) is not None, name


def _graphs_table(graphs: Mapping[str, OnnxRecord]) -> str:
    rows = [
        f"| {markdown_code(name)} | {record.steps_text} | {markdown_text(record.dtype or '')}"
        f"{record.quantised_text} | {markdown_text(record.attention or '')} | {_data_text(record)} |"
        for name, record in sorted(graphs.items())
    ]
    return "\n".join([_GRAPHS, *rows, "", *_cost_lines(graphs)])


def _cost_lines(graphs: Mapping[str, OnnxRecord]) -> list[str]:
    """What quantising costs in each graph, as a list; nothing if it was not measured."""
    costs = {name: read_cost(record.cost) for name, record in sorted(graphs.items())}
    lines = [
        f"- {markdown_code(name)}, {cost.words(markdown_text(cost.text))}"
        for name, cost in costs.items()
        if cost is not None
    ]
    return [_COSTS, *lines, ""] if lines else []


def _data_text(record: OnnxRecord) -> str:
    names = record.data or ()
    return markdown_code(names[0]) if len(names) == 1 else f"{len(names)} `.safetensors` files"


def _quantised_graph(graphs: Mapping[str, OnnxRecord]) -> str | None:
    """The graph to show for transformers.js: one with quantised weights; None if there is none."""
    small = [
        name for name in sorted(graphs, key=_rank) if graphs[name].attention == "portable" and _javascript_name(name)[1]
    ]
    return min(small, key=lambda name: _JAVASCRIPT_DTYPES.index(_javascript_name(name)[1]), default=None)


def _javascript_name(name: str) -> tuple[str, str]:
    """A graph's name for transformers.js: `model_file_name`, and the `dtype` that adds the rest; empty for none."""
    stem = name.removesuffix(".onnx")
    first, _, last = stem.rpartition("_")
    return (first, last) if last in _JAVASCRIPT_DTYPES else (stem, "")


def _transformers_js(name: str, record: OnnxRecord, num_layers: int) -> str:
    spec = make_spec(**(record.spec or {}))
    num_slots = cache_slots(spec, num_layers)
    slots = f"config.num_hidden_layers = {num_slots};  // number of cache slots\n" if num_slots != num_layers else ""
    data = ", ".join(map(javascript_literal, record.data or ()))
    stem, dtype = _javascript_name(name)
    chosen = f'"{dtype}"' if dtype else '"fp32"'
    note = "" if dtype else " // fp32: a name without suffix"
    return _TRANSFORMERS_JS.format(
        id=LOCAL_ID, slots=slots, data=data, stem=javascript_literal(stem), dtype=chosen, note=note
    )


_JAVASCRIPT_DTYPES = ("q4", "int8", "q4f16")  # words of transformers.js that are ours too, the best to show first


_IMAGE = {
    "auto": "AutoModelForImageTextToText",
    "item": '{"type": "image", "url": "https://example.com/picture.jpg"}',
    "question": "What is in this picture?",
}
_SOUND = {
    "auto": "AutoModelForMultimodalLM",
    "item": '{"type": "audio", "url": "https://example.com/speech.wav"}',
    "question": "What is said here?",
}
_MULTIMODAL = """\
```python
from transformers import {auto}, AutoProcessor

{path}processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = {auto}.from_pretrained(path, trust_remote_code=True)
{steps}

question = {{"type": "text", "text": "{question}"}}
chat = [{{"role": "user", "content": [{item}, question]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```
"""

_VLLM = """\
### vLLM

vLLM's Transformers backend serves this directory or repository with the code in it; `--tensor-parallel-size` works too:

```sh
python -m vllm.entrypoints.openai.api_server --model PATH_OR_ID --trust-remote-code{options}
```

Tested with tiny models of this family, on the CPU in fp32, with vLLM 0.32: greedy tokens equal those of transformers.
"""

_MLX = """\
### MLX

mlx-lm {release} or newer loads this directory or repository with the code in it, nothing converted:

```sh
mlx_lm.generate --model PATH_OR_ID --trust-remote-code --prompt "Hello"
```

`mlx_lm.chat`, `mlx_lm.server` and `mlx_lm.convert -q` take the same flag. In Python,
`mlx_lm.load(PATH_OR_ID, trust_remote_code=True, model_config={{"loop_steps": {steps}}})` loads it with any K.

Tested with tiny models of this family, on the CPU in fp32, against transformers. Metal was not tried.
"""

_GRAPHS = """\
### ONNX Runtime

These graphs contain the unrolled loop and run without the code of this model. Each graph reads its weights from files
next to it, so keep them in one directory. Graphs in bf16 run on CUDA only.

| graph | K | computes in | attention | weights |
| --- | --- | --- | --- | --- |"""

_COSTS = """\
What quantising costs: how far the next tokens are from those of the model in fp32.
"""

_RUN = """\
With LoopExport ({command} does the same):

```python
from loopexport.onnx import OnnxModel
{path}print(OnnxModel(path, {name}).answer("Hello"))
```
"""

_GENAI = """\
With onnxruntime-genai, which finds the graph through `genai_config.json`:

```python
import onnxruntime_genai

model = onnxruntime_genai.Model(path)
```
"""

_OPTIMUM = """\
With optimum-onnx, use the base's config, because the loop is in the graph. The last line sets the shape of the cache,
which optimum-onnx otherwise guesses from the name of the family:

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig

config = AutoConfig.from_pretrained(path, subfolder="base")
model = ORTModelForCausalLM.from_pretrained(path, config=config, file_name={name})
_, model.num_key_value_heads, _, model.embed_size_per_head = model.input_shapes["past_key_values.0.key"]
```
"""

_TRANSFORMERS_JS = """\
With transformers.js 4, if it supports the base's family; it keeps the weights files in memory:

```js
import {{ AutoModelForCausalLM }} from "@huggingface/transformers";

{id}const config = await (await fetch(`https://huggingface.co/${{id}}/resolve/main/base/config.json`)).json();
{slots}const externalData = [{data}].map((name) => ({{ path: name, data: name }}));
const model = await AutoModelForCausalLM.from_pretrained(id, {{
  config, subfolder: "", model_file_name: {stem}, dtype: {dtype},{note}
  session_options: {{ externalData }},
}});
```
"""
