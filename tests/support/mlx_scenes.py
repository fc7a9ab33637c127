"""What users of mlx-lm do with an export, each in a scene that compares it with an independent computation.

Runs where mlx-lm is installed, and imports nothing of LoopExport:

    python mlx_scenes.py SCENES.json OUTCOMES.json

SCENES.json is a list of objects with `scene`, the name of a function below, and its arguments. OUTCOMES.json gets one
object for each: what the function returned, or `error`.

The references are: the native model with the span's layers a second time in its list (`unrolled`), which equals naive
looping under `per_step`; and the loop by hand over the native layers (`by_hand`), under `shared`.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import mlx.core as mx
from mlx_lm import convert as convert_model
from mlx_lm.generate import BatchGenerator, generate_step, maybe_quantize_kv_cache, speculative_generate_step
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import load_model

LENGTHS = (5, 1, 1, 7, 1, 1, 1, 4)
NEW_TOKENS = 12
KV = {"kv_group_size": 32, "kv_bits": 8}


def main(scenes: str, outcomes: str) -> None:
    done = []
    for each in json.loads(Path(scenes).read_text()):
        try:
            done.append(globals()[each.pop("scene")](**each))
        except Exception as error:
            traceback.print_exc()
            done.append({"error": str(error) or type(error).__name__})
        Path(outcomes).write_text(json.dumps(done))


def load(directory, **fields):
    return load_model(Path(directory), model_config=fields, trust_remote_code=True)[0]


def tokens(count, seed=0):
    return mx.random.randint(3, 131, (1, count), key=mx.random.key(seed))


def chunks(model, cache=None, quantised=False):
    """The logits of chunks and steps through one cache, as `generate_step` runs them."""
    cache = make_prompt_cache(model) if cache is None else cache
    parts, start, ids = [], 0, tokens(sum(LENGTHS))
    for length in LENGTHS:
        parts.append(model(ids[:, start : start + length], cache=cache))
        if quantised:
            maybe_quantize_kv_cache(cache, 0, **KV)
        start += length
    return mx.concatenate(parts, axis=1)


def difference(ours, theirs):
    """The largest difference, relative to the scale; 0 if they are bitwise equal."""
    return float(mx.abs(ours - theirs).max() / mx.abs(theirs).max())


def unrolled(base, span):
    """The native model with the span's layers twice."""
    model = load(base)
    layers = model.model.layers
    model.model.layers = [*layers[: span[1]], *layers[span[0] :]]
    return model


class Recorded:
    """The cache in the natural pass: notes what it answers. Then the cache in an iteration, with the same answer."""

    def __init__(self, cache):
        self.cache, self.answer, self.start = cache, None, cache.offset

    @property
    def offset(self):
        return self.start

    def update_and_fetch(self, keys, values):
        if self.answer is None:
            self.answer = self.cache.update_and_fetch(keys, values)
        return self.answer

    def __getattr__(self, name):
        return getattr(self.cache, name)


class ByHand:
    """The loop over a native llama under `shared`, in block mode with rule euler."""

    def __init__(self, base, span, steps):
        self.native, self.span, self.steps = load(base), span, steps
        self.layers = self.native.layers

    def __call__(self, ids, cache):
        native, (start, stop) = self.native, self.span
        h = native.model.embed_tokens(ids)
        mask = create_attention_mask(h, cache[0])
        seen = {}
        for index, layer in enumerate(native.layers):
            if index == start:
                x = h
            if start <= index < stop:
                seen[index] = Recorded(cache[index])
            h = layer(h, mask, seen.get(index, cache[index]))
            if index == stop - 1:
                h = self.iterate(x, h, mask, seen)
        h = native.model.norm(h)
        return native.model.embed_tokens.as_linear(h) if native.args.tie_word_embeddings else native.lm_head(h)

    def iterate(self, x, natural, mask, seen):
        h = x + (natural - x) * (1 / self.steps)
        for _ in range(self.steps - 1):
            y = h
            for index in range(*self.span):
                y = self.native.layers[index](y, mask, seen[index])
            h = h + (y - h) * (1 / self.steps)
        return h


def greedy(model, prompt, **options):
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS, **options)]


def prompts():
    return [tokens(length, seed=length)[0].tolist() for length in (3, 9, 17)]


# Scenes


def identity(export, base):
    """K = 1 and anchor 1 are bitwise the base, and need no more cache."""
    plain = load(base)
    ids = tokens(20)
    return {
        "differences": [
            difference(load(export, **fields)(ids), plain(ids)) for fields in ({"loop_steps": 1}, {"loop_anchor": 1.0})
        ],
        "looped": difference(load(export)(ids), plain(ids)),
        "slots": len(make_prompt_cache(load(export, loop_steps=1))) - len(plain.layers),
    }


def naive(export, base, span, quantised):
    """Naive looping under per_step against the unrolled model, and how much the K/V cache's rounding changes."""
    model = load(export)
    ours, theirs = chunks(model, quantised=quantised), chunks(unrolled(base, span), quantised=quantised)
    return {"difference": difference(ours, theirs), "rounding": difference(ours, chunks(model))}


def shared(export, base, span, steps, quantised=False, max_size=None):
    """A loop under shared against the loop by hand; and how much K, and the size and rounding of the cache, change."""
    model, hand = load(export, loop_steps=steps), ByHand(base, span, steps)

    def cache():
        return [KVCache() if max_size is None else RotatingKVCache(max_size, keep=4) for _ in model.layers]

    ours, theirs = chunks(model, cache(), quantised), chunks(hand, cache(), quantised)
    return {"difference": difference(ours, theirs), "effect": difference(ours, chunks(load(export)))}


def short_cache(export):
    """A cache without slots for iterations: an error."""
    model = load(export)
    model(tokens(3), cache=make_prompt_cache(model)[: len(model.layers)])


def foreign_cache(export, fields, quantised=False):
    """A cache that was filled under one loop, then a forward of another: what it computes, or an error."""
    first, second = (load(export, **each) for each in fields)
    cache = make_prompt_cache(first)
    filled = first(tokens(9), cache=cache)
    if quantised:
        maybe_quantize_kv_cache(cache, 0, **KV)
        first(tokens(1), cache=cache)
    return {"slots": len(cache), "filled": bool(filled.any()), "sum": float(second(tokens(3), cache=cache).sum())}


def batch(export):
    """Generation in a batch, whose prompts are padded, against one prompt at a time."""
    model = load(export)
    generator = BatchGenerator(model, max_tokens=NEW_TOKENS)
    ids = generator.insert(prompts())
    answers = {each: [] for each in ids}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    return {"batch": list(answers.values()), "single": [greedy(model, prompt) for prompt in prompts()]}


def stored_prompt(export):
    """A prompt cache that is saved, loaded and trimmed, against none."""
    model, prompt = load(export), prompts()[2]
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prompt[:12]]), cache=cache))
    with tempfile.TemporaryDirectory() as folder:
        save_prompt_cache(f"{folder}/cache.safetensors", cache)
        loaded = load_prompt_cache(f"{folder}/cache.safetensors")
        trim_prompt_cache(cache, 4)
        return {
            "answers": [greedy(model, prompt[12:], prompt_cache=loaded), greedy(model, prompt[8:], prompt_cache=cache)],
            "single": greedy(model, prompt),
            "slots": len(loaded),
        }


def drafted(export, base):
    """Speculative decoding with the base as draft, against none."""
    model, prompt = load(export), prompts()[1]
    steps = speculative_generate_step(mx.array(prompt), model, load(base), max_tokens=NEW_TOKENS)
    drawn = [(token, is_draft) for token, _, is_draft in steps]
    return {
        "drafted": [token for token, _ in drawn],
        "single": greedy(model, prompt),
        "accepted": sum(flag for _, flag in drawn),
    }


def quantised_weights(export, base, span, steps, folder):
    """`mlx_lm.convert -q` of an export, against the loop by hand over the quantised base."""
    out = Path(folder)
    out.mkdir()
    options = {"quantize": True, "q_bits": 4, "q_group_size": 32}
    convert_model(str(export), str(out / "looped"), trust_remote_code=True, **options)
    convert_model(str(base), str(out / "base"), **options)
    model, hand = load(out / "looped"), ByHand(out / "base", span, steps)
    ours = chunks(model)
    return {
        "difference": difference(ours, chunks(hand, make_prompt_cache(hand.native))),
        "rounding": difference(ours, chunks(load(export))),
        "files": sorted(path.name for path in (out / "looped").iterdir()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
