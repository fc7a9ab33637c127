"""Fuzzing: whatever the input, a command ends in one clear line or in a correct result, and never leaves half a one.

Each test draws a change to something that users or strangers write (config, index, weights headers, side files, loop
spec, names, an export's own files), runs the real command line on a tiny checkpoint that has it, and holds the outcome
to the same invariants. By default a fixed sample is drawn; LOOPEXPORT_FUZZ_EXAMPLES=20000 draws that many at random.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

import loopexport
from loopexport.base.checkpoint import CARRIED
from loopexport.base.safetensors_header import DTYPE_BITS, read_header
from loopexport.errors import CheckpointError
from loopexport.export.integrity import check_files
from loopexport.loop.spec import RULES, SPEC_KEYS
from support.checkpoints import write_sparse_checkpoint
from support.commands import SPEC, run

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OURS = {"model_type", "architectures", "auto_map", *(f"loop_{key}" for key in SPEC_KEYS)}

EXAMPLES = os.environ.get("LOOPEXPORT_FUZZ_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 250),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def explore(strategy, check):
    """Run `check` on what `strategy` draws."""

    def run_check(drawn):
        check(drawn)

    SETTINGS(given(strategy)(run_check))()


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
    """A list nested `depth` times; JSON text of it is written by hand, since `json.dumps` gives up early."""

    def __init__(self, depth):
        self.depth = depth

    def __repr__(self):
        return f"Deep({self.depth})"


DEEP = (st.sampled_from([10, 300, 600, 1200, 5000]) | st.integers(700, 1000)).map(Deep)


def to_json(value) -> str:
    """JSON text of `value`, which may hold a `Deep` at its top level."""
    deep = {key: each for key, each in value.items() if isinstance(each, Deep)} if isinstance(value, dict) else {}
    if not deep:
        return json.dumps(value)
    text = json.dumps({key: each for key, each in value.items() if key not in deep})
    parts = [f"{json.dumps(key)}: {'[' * each.depth}{']' * each.depth}" for key, each in deep.items()]
    return text[:-1] + ", " * (len(value) > len(deep)) + ", ".join(parts) + "}"


def mutated(original: dict, keys, values):
    """`original` with one to three of its keys, or others, dropped, renamed or given another value."""
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
    """The bytes of `text` cut off, with bytes replaced, doubled, or in another encoding."""
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
            st.sampled_from([f"--{key.replace('_', '-')}" for key in SPEC_KEYS] + ["--revision", "--weights"]),
            SPEC_TEXTS,
        ),
        st.sampled_from([("--frozen-routing",), ("--norm-interpolation",), ("--json",), ("--overwrite",)]),
    ),
    max_size=5,
).map(lambda options: [part for option in options for part in option])

YAML_SNIPPETS = st.sampled_from(
    ["1:4", "0:6", "740", "5", "1:75", "[1, 4]", "[[0, 1], [2, 4]]", "[0:1, 2:4]", "&a [*a]", "&a [x, *a]", "*a", "3",
     "&a {b: *a}", "2024-01-01", "2024-99-99", "!!timestamp x", "!!int x", "!!int ''", "!!bool maybe", "!!float x",
     "!!binary '?'", "!!set {a, b}", "!!python/object:os.system {}", "!x y", "0x" + "f" * 9999, "1" + "0" * 6000,
     ".inf", ".nan", "1e-3", "0.5", "yes", "~", "''", '"\\ud800"', '"\\U00110000"', '"\\UFFFFFFFF"', "[" * 2000,
     "{a: " * 2000, "? [a]\n: b", "@", "`", "%", "|\n  x", "shared", "per_step", "euler", "ema", "- 1\n- 2", "<<: 1"]
)  # fmt: skip
YAML_KEYS = st.sampled_from(
    [*SPEC_KEYS, "span", "steps", "span", "steps", "model", "out", "revision", "weights", "overwrite", "dry_run",
     "self", "1", "null", "true", "2024-01-01", "<<", "? [a, b]\n", "&a", "[x]", "", "é"]
)  # fmt: skip
YAML_LINES = st.lists(st.tuples(YAML_KEYS, YAML_SNIPPETS | TEXTS), max_size=5).map(
    lambda lines: "".join(f"{key}: {value}\n" for key, value in lines)
)
PLAUSIBLE_SPECS = st.fixed_dictionaries(
    {"span": st.sampled_from(["1:4", [1, 4], [[0, 1], [2, 4]], (1, 4), ["0:1", "2:4"]]), "steps": st.integers(1, 9)},
    optional={key: JUNK for key in SPEC_KEYS if key not in ("span", "steps")},
)
YAML_BYTES = st.one_of(
    YAML_LINES.map(lambda text: text.encode("utf-8", "surrogatepass")),
    YAML_LINES.map(lambda text: ("span: 1:4\nsteps: 3\n" + text).encode("utf-8", "surrogatepass")),
    st.dictionaries(st.sampled_from(SPEC_KEYS) | SCALARS, JUNK, max_size=4).map(lambda it: yaml.dump(it).encode()),
    PLAUSIBLE_SPECS.map(lambda it: yaml.dump(it).encode()),
    damaged("span: 1:4\nsteps: 3\ndamping: 0.5\n"),
    st.binary(max_size=30),
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
    """A tensor's entry, most often one that fits the extent."""
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


@st.composite
def shard_bytes(draw):
    """A safetensors file: a few tensors of a few bytes, end to end or not quite, of the right size or not."""
    entries, offset = {}, 0
    for name in draw(st.lists(TENSOR_NAMES, max_size=4, unique=True)):
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


# --- What must hold --------------------------------------------------------------------------------------------------


def contents(root: Path) -> dict[bytes, bytes | None]:
    """All that lies below a directory, by name: bytes of files, None for all else."""
    found: dict[bytes, bytes | None] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        found |= {os.path.join(folder, name): None for name in folders}
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[path] = file.read()
    return found


class Scene:
    """A directory with a pristine checkpoint and an export of it, of which each example gets copies."""

    def __init__(self, root: Path):
        self.root = root
        self.numbers = count()
        self.base = write_sparse_checkpoint(root / "pristine", shards=2, shard_bytes=1000, layers_per_shard=3)
        self.config = json.loads((self.base / "config.json").read_text())
        self.index = json.loads((self.base / INDEX).read_text())
        for name, text in {"tokenizer.json": "{}", "LICENSE": "free", "README.md": "---\nlicense: mit\n---\n"}.items():
            (self.base / name).write_text(text)
        (self.base / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
        self.export = loopexport.convert(str(self.base), root / "export", span=(1, 4), steps=3, weights="copy").root
        self.manifest = json.loads((self.export / "loopexport.json").read_text())

    def copy(self, source: Path, changes: dict[str, bytes]) -> Path:
        """A directory of its own with a copy of `source`, some of its files replaced."""
        place = self.root / str(next(self.numbers))
        shutil.copytree(source, place / "base")
        for name, content in changes.items():
            (place / "base" / name).write_bytes(content)
        return place

    def try_convert(self, changes: dict[str, bytes], *options, spec=SPEC) -> int:
        """Hold a conversion of a base with these files, and its dry run, to the invariants; returns the exit status."""
        place = self.copy(self.base, changes)
        status = assert_sound_convert(place, *spec, *options)
        shutil.rmtree(place)
        return status


def assert_clean(result) -> None:
    """A known exit status, and on 1 one line of plain text on stderr."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 1:
        assert result.stderr.startswith("Error: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr[:-1].isprintable(), result.stderr


def assert_sound_convert(place: Path, *options, base="base", out="out") -> int:
    """Convert `place/base`, dry and then really, and check all that is promised whatever comes of it."""
    before = contents(place)
    command = ["convert", place / base, place / out, *options]
    planned = run(*command, "--dry-run")
    assert_clean(planned)
    assert contents(place) == before
    done = run(*command, "--json")
    assert_clean(done)
    assert done.exit_code == planned.exit_code, (planned.stderr, done.stderr)
    after = contents(place)
    if done.exit_code != 0:
        assert after == before
        return done.exit_code
    inside = os.fsencode(place / out)
    assert {path: content for path, content in after.items() if path != inside and inside + b"/" not in path} == before
    assert_true_export(place / base, place / out)
    return 0


def assert_true_export(base: Path, out: Path) -> None:
    """The base's config with our fields, its weights and small files byte for byte, a manifest that holds."""
    theirs, ours = (json.loads((root / "config.json").read_bytes()) for root in (base, out))
    assert ours["model_type"] == f"looped_{theirs['model_type']}"
    assert set(ours) == set(theirs) | OURS
    for key in set(theirs) - OURS:
        assert json.dumps(theirs[key]) == json.dumps(ours[key]), key
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (base / path.name).read_bytes()
        deserialize(path.read_bytes())
    for path in base.iterdir():
        if path.is_file() and CARRIED.fullmatch(path.name):
            kept = out / "base" / path.name
            assert (kept if kept.exists() else out / path.name).read_bytes() == path.read_bytes()
    export = loopexport.open_export(out)
    assert [check.detail for check in check_files(export, full=True) if not check.passed] == []
    shown = run("inspect", out)
    assert (shown.exit_code, shown.exception) == (0, None), shown.stderr


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("fuzz"))


def test_any_config_is_refused_clearly_or_exported_whole(scene):
    explore(
        json_bytes(scene.config, CONFIG_KEYS, CONFIG_VALUES),
        lambda config: scene.try_convert({"config.json": config}),
    )


def test_any_index_is_refused_clearly_or_exported_whole(scene):
    weight_map = scene.index["weight_map"]
    maps = mutated(weight_map, TEXTS, INDEX_VALUES).map(lambda each: json.dumps({"weight_map": each}).encode())
    explore(
        maps | json_bytes(scene.index, st.just("weight_map") | TEXTS, JUNK),
        lambda index: scene.try_convert({INDEX: index}),
    )


def test_any_weights_file_is_refused_clearly_or_exported_whole(scene):
    explore(
        st.tuples(st.sampled_from([SHARDS[0], "model.safetensors"]), shard_bytes()),
        lambda it: scene.try_convert({it[0]: it[1]}),
    )


def test_weights_header_is_accepted_exactly_when_the_safetensors_library_accepts_it(tmp_path):
    path = tmp_path / "x.safetensors"

    def accepts(function, *arguments) -> bool:
        try:
            function(*arguments)
        except (CheckpointError, SafetensorError):
            return False
        return True

    def check(raw):
        path.write_bytes(raw)
        ours = accepts(read_header, path)
        if ours and any(tensor.dtype not in DTYPE_BITS for tensor in read_header(path).tensors.values()):
            return  # newer than the table, and perhaps than the library
        assert ours == accepts(deserialize, raw)

    explore(shard_bytes(), check)


def test_any_side_files_are_exported_with_the_model(scene):
    def check(files):
        assert scene.try_convert(files) == 0

    explore(SIDE_FILES, check)


def test_any_options_are_refused_clearly_or_exported_whole(scene):
    explore(
        st.tuples(st.sampled_from([[], SPEC, SPEC]), OPTIONS),
        lambda it: scene.try_convert({}, *it[1], spec=it[0]),
    )


def test_any_spec_file_is_refused_clearly_or_exported_whole(scene):
    def check(text):
        place = scene.copy(scene.base, {})
        (place / "loop.yaml").write_bytes(text)
        assert_sound_convert(place, "--spec", place / "loop.yaml")
        shutil.rmtree(place)

    explore(YAML_BYTES, check)


def test_any_keywords_raise_only_our_errors(scene):
    values = JUNK | st.binary(max_size=2) | st.tuples(JUNK, JUNK) | st.sets(st.integers(), max_size=2)
    keywords = st.dictionaries(st.sampled_from(SPEC_KEYS), values, max_size=3)
    number = count()

    def check(keywords):
        out = scene.root / f"keywords-{next(number)}"
        try:
            planned = loopexport.plan_convert(str(scene.base), out, **keywords)
        except loopexport.LoopExportError:
            planned = None
        try:
            loopexport.convert(str(scene.base), out, **keywords)
        except loopexport.LoopExportError:
            assert planned is None
            assert not out.exists()
        else:
            assert planned is not None
            assert_true_export(scene.base, out)
            shutil.rmtree(out)

    explore(
        PLAUSIBLE_SPECS | PLAUSIBLE_SPECS.flatmap(lambda spec: keywords.map(lambda it: spec | it)) | keywords, check
    )


def test_any_names_are_refused_clearly_or_exported_whole(scene):
    """Names of the base, of the output and of a file that lies in the base, as the file system may hold them."""

    def check(names):
        base, out, stray = map(os.fsdecode, names)
        place = scene.copy(scene.base, {})
        if base != "base":
            (place / "base").rename(place / base)
        (place / base / stray).write_bytes(b"{}")
        if base not in (out, ".out"):
            assert_sound_convert(place, *SPEC, base=base, out=out)
        shutil.rmtree(place)

    plain = [(b"base", b"out", b"stray")]
    spots = st.sampled_from([0, 1, 2])
    explore(
        st.tuples(st.sampled_from(plain), spots, BYTE_NAMES).map(
            lambda it: tuple(it[2] if spot == it[1] else name for spot, name in enumerate(it[0]))
        )
        | st.tuples(BYTE_NAMES, BYTE_NAMES, BYTE_NAMES),
        check,
    )


def test_any_words_on_the_command_line_are_refused_clearly_or_work(scene, monkeypatch):
    place = scene.copy(scene.base, {})
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    commands = ["convert", "inspect", "verify", "restore", "rules", "--help"]
    words = SPEC_TEXTS | st.sampled_from(
        ["../base", "out", "~nobody-here/x", "~", ".", "..", "/", "x" * 300, "x/" * 3000, "org/model", "../base/x",
         "--json", "--dry-run", "--files-only", "--full", *SPEC]
    )  # fmt: skip

    def check(words):
        before = contents(place / "base")
        result = run(*words)
        assert_clean(result)
        assert contents(place / "base") == before
        leftovers = contents(place / "here")
        if result.exit_code:
            assert leftovers == {}
        shutil.rmtree(place / "here")
        (place / "here").mkdir()
        os.chdir(place / "here")

    explore(st.tuples(st.sampled_from(commands), st.lists(words, max_size=4)).map(lambda it: [it[0], *it[1]]), check)


MANIFEST_KEYS = st.sampled_from(["format", "base", "spec", "weights", "files", "left_behind", "config.json"]) | TEXTS
NAMES_OUTSIDE = st.sampled_from(
    ["../x", "/etc/hostname", "base/../../x", "base/../x", "a/../../x", "..", ".", "", "x\0y", "\ud800", "x\ny", "é",
     "loopexport.json", "base/../LICENSE", "base//etc/hostname", "base/", "base", "LICENSE/", "./LICENSE"]
)  # fmt: skip


def mutated_manifest(manifest: dict):
    """A manifest that is changed at its top, in one of its groups, or in one record."""
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


def test_any_export_is_refused_clearly_or_read_and_restored_exactly(scene):
    (scene.root / "x").write_bytes(b"not ours")
    config = json.loads((scene.export / "config.json").read_text())
    files = st.one_of(
        st.fixed_dictionaries({"loopexport.json": mutated_manifest(scene.manifest)}),
        st.fixed_dictionaries({"config.json": json_bytes(config, CONFIG_KEYS, CONFIG_VALUES)}),
        st.fixed_dictionaries({"base/config.json": json_bytes(scene.config, CONFIG_KEYS, CONFIG_VALUES)}),
        st.fixed_dictionaries({INDEX: json_bytes(scene.index, TEXTS, JUNK)}),
    )

    def check(changes):
        place = scene.copy(scene.export, changes)
        (place / "x").write_bytes(b"not ours")
        before = contents(place)
        for command in (["inspect"], ["inspect", "--json"], ["verify", "--files-only"], ["verify", "--full"]):
            options = ["--files-only"] if command[-1] == "--full" else []
            result = run(command[0], place / "base", *command[1:], *options)
            if command[0] == "verify" and result.exit_code == 1 and "Error: " not in result.stderr:
                assert "FAIL" in result.stdout
            else:
                assert_clean(result)
        assert contents(place) == before
        verified = result.exit_code == 0
        restored = run("restore", place / "base", place / "out")
        assert_clean(restored)
        assert (restored.exit_code == 0) == verified, restored.stderr
        inside = os.fsencode(place / "out")
        after = contents(place)
        if restored.exit_code:
            assert after == before
        else:
            outside = {path: each for path, each in after.items() if path != inside and inside + b"/" not in path}
            assert outside == before
            ours, theirs = (
                {os.path.relpath(path, os.fsencode(root)): each for path, each in contents(root).items()}
                for root in (place / "out", scene.base)
            )
            assert ours == theirs
        shutil.rmtree(place)

    explore(files, check)
