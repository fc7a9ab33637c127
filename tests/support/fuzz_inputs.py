"""Random inputs of the fuzz tests: configs, indexes, spec files, names, weights headers and manifests."""

from __future__ import annotations

import json
import os

import yaml
from hypothesis import strategies as st

from loopexport.base.safetensors_header import DTYPE_BITS
from loopexport.loop.spec import FILE_KEYS, RULES, SPEC_KEYS

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# --- What is drawn ---------------------------------------------------------------------------------------------------

ODD_TEXTS = st.sampled_from(
    ["", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\n", "x\ny", "\x1b[31m", "\ud800", "é", "नमस्ते", "{0}",
     "%s", "looped_llama", "LlamaForCausalLM", "None", "nan", "llama\x00", "x" * 300, "1" * 5000]
)  # fmt: skip
TEXTS = ODD_TEXTS | st.text(st.characters(exclude_categories=()), max_size=12)
ODD_NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 6, 7, 2**31, 2**63, 2**64, -(2**63), 10**18, 10**400, 10**4000, 0.0, -0.0, 0.5, 1.0, 6.0, 1e308,
     -1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | ODD_NUMBERS | st.integers() | st.floats() | TEXTS
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


class Deep:
    """A list nested `depth` times; `to_json` writes it by hand, because `json.dumps` fails at such a depth."""

    def __init__(self, depth):
        self.depth = depth

    def __repr__(self):
        return f"Deep({self.depth})"


DEEP = (st.sampled_from([10, 300, 600, 1200, 5000]) | st.integers(700, 1000)).map(Deep)


def to_json(value) -> str:
    """JSON text of `value`; a dict may have a `Deep` among its values."""
    deep = {key: each for key, each in value.items() if isinstance(each, Deep)} if isinstance(value, dict) else {}
    if not deep:
        return json.dumps(value)
    text = json.dumps({key: each for key, each in value.items() if key not in deep})
    parts = [f"{json.dumps(key)}: {'[' * each.depth}{']' * each.depth}" for key, each in deep.items()]
    return text[:-1] + ", " * (len(value) > len(deep)) + ", ".join(parts) + "}"


def mutated(original: dict, keys, values):
    """`original` with one to three changes: a key dropped, renamed, added, or given another value."""
    names = st.sampled_from(sorted(original)) | keys
    change = st.one_of(
        st.tuples(st.just("set"), names, values),
        st.tuples(st.just("drop"), names, st.none()),
        st.tuples(st.just("rename"), names, keys),
    )

    def apply(changes):
        result = dict(original)
        for kind, name, value in changes:
            if kind == "set":
                result[name] = value
            elif name in result:
                old = result.pop(name)
                if kind == "rename":
                    result[value] = old
        return result

    return st.lists(change, min_size=1, max_size=3).map(apply)


def damaged(text: str):
    """The bytes of `text`, cut off, with bytes replaced or doubled, or in another encoding."""
    raw = text.encode("utf-8", "surrogatepass")
    places = st.integers(0, len(raw))
    return st.one_of(
        places.map(lambda place: raw[:place]),
        st.tuples(places, st.binary(max_size=4)).map(lambda it: raw[: it[0]] + it[1] + raw[it[0] + len(it[1]) :]),
        st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]).map(lambda encoding: text.encode(encoding, "replace")),
        st.sampled_from([raw + raw, raw + b" \n", b"\x00" + raw, b"", b"null", b"[]", b"7", b'"x"']),
    )


def json_bytes(original: dict, keys, values):
    """The bytes of a JSON file: a mutated object, or damaged text."""
    structured = mutated(original, keys, values | DEEP).map(lambda value: to_json(value).encode())
    return st.one_of(structured, structured, structured, damaged(json.dumps(original)))


CONFIG_KEYS = st.sampled_from(
    ["n_layer", "n_layers", "num_layers", "layer_types", "layers_block_type", "head_dim", "num_key_value_heads",
     "text_config", "quantization_config", "auto_map", "dtype", "is_encoder_decoder", "is_decoder", "decoder_layers",
     "num_experts", "num_local_experts", "rope_scaling", "self", "config", "__class__", "model_type", "architectures",
     "num_hidden_layers", "hidden_size", "num_attention_heads", *(f"loop_{key}" for key in SPEC_KEYS)]
) | TEXTS  # fmt: skip
LAYER_TYPES = st.lists(
    st.sampled_from(["full_attention", "sliding_attention", "linear_attention", "mamba", None, 7, ["x"], "\n"]),
    max_size=8,
)
CONFIG_VALUES = st.one_of(
    JUNK,
    LAYER_TYPES,
    st.sampled_from(
        ["llama", "gpt2", "mamba", "bert", "t5", "martian", "looped_llama", "qwen3_moe", "bfloat16", "torch.float16",
         ["LlamaForCausalLM"], ["LlamaForCausalLM", None], {"LlamaForCausalLM": 1}, [7], {"quant_method": "gptq"}]
    ),
)  # fmt: skip
FILE_NAMES = st.sampled_from([*SHARDS, "model.safetensors", "config.json", "extra.safetensors", "\n.safetensors"])
INDEX_VALUES = FILE_NAMES | TEXTS | TEXTS.map(lambda text: f"{text}.safetensors") | JUNK
SPEC_TEXTS = st.one_of(
    st.sampled_from(
        ["1:4", "0:6", "4:9", "2:2", "5:1", "-1:3", "1-3", "0:1", "1:4:5", "\u0661:\u0663", "1", "2", "3", "8", "1e9",
         "9" * 400,
         "1:3x2", "1:3x0", "1:3x", "4:6 x 3", "0-3,1-5", "0..3,2..5", "0:4,1:6", "0,1,1,2,3,4,5", "layers:0,1,2",
         "0-3,2-3,1-5", "2147483647", "0-4", "0-9,2-9", "0-99999999", "3-1", "1,4", "(1, 4)", "4,1", "0,0", "/",
         "/dev/null", "..",
         f"{'9' * 5000}:{'9' * 5001}", "0.5", "1", "1e-400", "1e400", "nan", "block", "layer", "shared", "per_step",
         "reference", "full", "bypass", "first_n", "0.5,0.25", "0.2,0.3,0.5", ",", "0.5,x", *RULES]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8),
    st.binary(max_size=6).filter(lambda raw: b"\0" not in raw).map(os.fsdecode),
)  # fmt: skip
OPTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([f"--{key.replace('_', '-')}" for key in FILE_KEYS] + ["--revision", "--weights"]),
            SPEC_TEXTS,
        ),
        st.sampled_from([("--frozen-routing",), ("--norm-interpolation",), ("--json",), ("--overwrite",)]),
    ),
    max_size=5,
).map(lambda options: [part for option in options for part in option])
YAML_SNIPPETS = st.sampled_from(
    ["1:4", "0:6", "740", "5", "1:75", "0-3,1-5", "[0-3, [1, 6]]", "[0, 1, 1, 2]", "&a [*a, *a]", "1,4",
     "[1, 4]", "[[0, 1], [2, 4]]", "[0:1, 2:4]", "&a [*a]", "&a [x, *a]", "*a", "3",
     "&a {b: *a}", "2024-01-01", "2024-99-99", "!!timestamp x", "!!int x", "!!int ''", "!!bool maybe", "!!float x",
     "!!binary '?'", "!!set {a, b}", "!!python/object:os.system {}", "!x y", "0x" + "f" * 9999, "1" + "0" * 6000,
     ".inf", ".nan", "1e-3", "0.5", "yes", "~", "''", '"\\ud800"', '"\\U00110000"', '"\\UFFFFFFFF"', "[" * 2000,
     "{a: " * 2000, "? [a]\n: b", "@", "`", "%", "|\n  x", "shared", "per_step", "euler", "ema", "- 1\n- 2", "<<: 1"]
)  # fmt: skip
YAML_KEYS = st.sampled_from(
    [*FILE_KEYS, "span", "steps", "span", "steps", "path", "rys", "model", "out", "revision", "weights", "overwrite",
     "dry_run",
     "self", "1", "null", "true", "2024-01-01", "<<", "? [a, b]\n", "&a", "[x]", "", "é"]
)  # fmt: skip
YAML_LINES = st.lists(st.tuples(YAML_KEYS, YAML_SNIPPETS | TEXTS), max_size=5).map(
    lambda lines: "".join(f"{key}: {value}\n" for key, value in lines)
)
PLAUSIBLE_SPECS = st.fixed_dictionaries(
    {"span": st.sampled_from(["1:4", [1, 4], [[0, 1], [2, 4]], (1, 4), ["0:1", "2:4"]]), "steps": st.integers(1, 9)},
    optional={key: JUNK for key in SPEC_KEYS if key not in ("span", "steps")},
) | st.fixed_dictionaries(
    {"path": st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 7)) | st.integers(0, 6), max_size=4)},
    optional={"kv": st.sampled_from(["shared", "per_step", "reference"]), "steps": st.integers(0, 3), "rys": JUNK},
)
YAML_BYTES = st.one_of(
    YAML_LINES.map(lambda text: text.encode("utf-8", "surrogatepass")),
    YAML_LINES.map(lambda text: ("span: 1:4\nsteps: 3\n" + text).encode("utf-8", "surrogatepass")),
    st.dictionaries(st.sampled_from(SPEC_KEYS) | SCALARS, JUNK, max_size=4).map(lambda it: yaml.dump(it).encode()),
    PLAUSIBLE_SPECS.map(lambda it: yaml.dump(it).encode()),
    damaged("span: 1:4\nsteps: 3\ndamping: 0.5\n"),
    damaged("path: 0-3,1-2,1-5\nkv: shared\n"),
    st.binary(max_size=30),
)
# mergekit configs of a model with six layers; most are passthrough slices with changes.
_RANGES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 7, -1]) | JUNK, min_size=2, max_size=2) | JUNK
_SOURCE = {"model": "org/m", "layer_range": [0, 4]}
_SOURCES = mutated(_SOURCE, st.sampled_from(["model", "layer_range", "parameters"]) | TEXTS, _RANGES | TEXTS)
_SLICES = st.lists(
    st.fixed_dictionaries({"sources": st.lists(st.just(_SOURCE) | _SOURCES, min_size=1, max_size=2) | JUNK}), max_size=3
)
_MERGE_KEYS = st.sampled_from(
    ["slices", "models", "modules", "merge_method", "base_model", "dtype", "parameters", "tokenizer_source"]
)
MERGEKIT_BYTES = st.one_of(
    _SLICES.map(lambda slices: {"slices": slices, "merge_method": "passthrough"})
    .flatmap(lambda config: st.just(config) | mutated(config, _MERGE_KEYS | TEXTS, JUNK | TEXTS))
    .map(lambda config: yaml.dump(config).encode()),
    damaged(yaml.dump({"slices": [{"sources": [_SOURCE]}], "merge_method": "passthrough"})),
    YAML_BYTES,
)
TOKENIZER_CONFIG = {"auto_map": {"AutoTokenizer": ["foreign.Tokenizer", None]}, "model_max_length": 1e30, "eos": "</s>"}
FRONT_MATTER = st.one_of(YAML_LINES, st.tuples(YAML_KEYS, YAML_SNIPPETS).map(lambda it: f"license: {it[1]}\n")).map(
    lambda text: f"---\n{text}---\n# Base\n".encode("utf-8", "surrogatepass")
)
SIDE_FILES = st.fixed_dictionaries(
    {},
    optional={
        "tokenizer_config.json": json_bytes(TOKENIZER_CONFIG, TEXTS, JUNK),
        "README.md": FRONT_MATTER | st.binary(max_size=40),
        "generation_config.json": json_bytes({"eos_token_id": 2}, TEXTS, JUNK),
        "tokenizer.json": st.binary(max_size=20),
        "LICENSE": st.binary(max_size=20),
        "loopexport.json": json_bytes({"format": 1}, TEXTS, JUNK),
    },
)
ODD_NAMES = st.sampled_from(
    [b"x\ny", b"\xff\xfe", b"\x1b[2J", b"x" * 240, b"x" * 255, "é".encode() * 100, b"base", b"loopexport.json", b" ",
     b"LICENSE.\xff", b"license", b"LICENSE", b"tokenizer.JSON", b"modeling_looped.py", b"configuration_looped.py",
     b"~", b"~nobody-here", b"-x", b".partial", b"'\"`$(x)", b"\\", b"{0}", b".git", b"Config.json"]
)  # fmt: skip
BYTE_NAMES = ODD_NAMES | st.binary(min_size=1, max_size=20).filter(
    lambda name: name not in (b".", b"..") and not {0, 47} & set(name)
)


def header_entry(start: int, end: int):
    """The header entry of a tensor; most of them fit the bytes from `start` to before `end`."""
    fitting = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    values = st.one_of(
        JUNK,
        st.sampled_from([*DTYPE_BITS, "F9", "bf16"]),
        st.lists(st.integers(-1, 9) | ODD_NUMBERS | st.booleans(), max_size=3),
    )
    return st.just(fitting) | mutated(fitting, st.sampled_from(sorted(fitting)), values)


TENSOR_NAMES = st.sampled_from(
    ["model.layers.0.w", "model.layers.1.w", "layers." + "9" * 5000 + ".w", "layers.\u0661.w", "lm_head.weight", "a",
     "model.embed_tokens.weight", "bert.encoder.layer.0.w", "model.layers.2.conv1d.weight", "\ud800", "", "\n"]
)  # fmt: skip
# One tensor for each layer of the fuzzed base, and a head: `convert` refuses weights that lack one.
WHOLE_MODEL = ("lm_head.weight", *(f"model.layers.{layer}.w" for layer in range(6)))


@st.composite
def shard_bytes(draw):
    """A safetensors file of a few small tensors; some have gaps or overlaps, or a wrong file size."""
    entries, offset = {}, 0
    names = st.lists(TENSOR_NAMES, max_size=4, unique=True)
    for name in dict.fromkeys([*draw(st.sampled_from([(), WHOLE_MODEL])), *draw(names)]):
        end = offset + draw(st.integers(0, 5))
        entries[name] = draw(header_entry(offset, end))
        offset = max(0, end + draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1])))
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.just({"format": "pt"}) | JUNK)
    text = to_json(entries)
    raw = draw(st.just(text.encode()) | st.just(text.encode()) | damaged(text))
    length = draw(
        st.just(len(raw)) | st.just(len(raw)) | st.sampled_from([0, 1, len(raw) + 1, 2**31, 2**63, 2**64 - 1])
    )
    size = max(0, offset + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 9])))
    whole = length.to_bytes(8, "little") + raw + bytes(size)
    return draw(st.just(whole) | st.just(whole) | st.integers(0, len(whole)).map(lambda cut: whole[:cut]))


MANIFEST_KEYS = st.sampled_from(["format", "base", "spec", "weights", "files", "left_behind", "config.json"]) | TEXTS
NAMES_OUTSIDE = st.sampled_from(
    ["../x", "/etc/hostname", "base/../../x", "base/../x", "a/../../x", "..", ".", "", "x\0y", "\ud800", "x\ny", "é",
     "loopexport.json", "base/../LICENSE", "base//etc/hostname", "base/", "base", "LICENSE/", "./LICENSE"]
)  # fmt: skip


def mutated_manifest(manifest: dict):
    """A manifest with a change at its top level, in one group, or in one record."""
    groups = [key for key, value in manifest.items() if isinstance(value, dict)]

    def inside(group):
        values = manifest[group]
        records = [key for key, value in values.items() if isinstance(value, dict)]
        changes = mutated(values, NAMES_OUTSIDE | TEXTS, JUNK | st.just({"size": 1, "sha256": "0" * 64}))
        if records:
            record = st.sampled_from(records)
            keys = st.sampled_from(["size", "sha256", "xxh3_128", "header_sha256"]) | TEXTS
            changes |= record.flatmap(
                lambda name: mutated(values[name], keys, JUNK).map(lambda it: {**values, name: it})
            )
        return changes.map(lambda it: {**manifest, group: it})

    nested = st.sampled_from(groups).flatmap(inside)
    return st.one_of(
        nested.map(lambda it: json.dumps(it).encode()),
        json_bytes(manifest, MANIFEST_KEYS, JUNK),
    )
