"""Walk the causal language models that the installed transformers knows: which can be looped, exactly?

Each family gets a tiny random base, which is converted, loaded and held to what holds for every family: no missing or
unexpected keys, one step is bitwise the base, a full forward under `per_step` is the replay of the base's own layers by
hand, cached decoding equals a full forward. `python -m support.family_walk` writes the outcomes into
`loopexport/base/families.json`, which `docs/families.md` and the refusals of `convert` come from.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import loopexport
from loopexport.base import families

RELEASE = ".".join(__version__.split(".")[:2])
TOLERANCE = 1e-5  # of the logits' scale, fp32
SMALLEST_EFFECT = 1e-4  # of the logits' scale: what a loop must change for the rest to mean anything
STEPS = 3
KV_POLICIES = ("per_step", "shared")
PREFILL, LENGTH = 5, 9
MAX_PARAMETERS = 50_000_000

# Set wherever a family's config has a field of that name.
TINY = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "n_embd": 64, "n_layer": 6, "n_layers": 6, "num_layers": 6, "n_head": 4, "n_heads": 4, "n_inner": 96,
    "n_positions": 64, "ffn_hidden_size": 96, "d_model": 64, "rotary_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_expand": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
# What a family needs beyond that to exist at this size.
SPECIAL: dict[str, dict] = {
    "apertus": {"hidden_act": "silu"},
    "bamba": {"attn_layer_indices": [1, 4]},
    "blenderbot": {"decoder_layers": 6, "decoder_ffn_dim": 96, "decoder_attention_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"use_mamba_kernels": False},
    "doge": {"keep_window_size": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 131,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": 131,
        "hidden_size_per_layer_input": 16,
    },
    "inkling2_text": {"unpadded_vocab_size": 131},
    "inkling2_loop_text": {"unpadded_vocab_size": 131},
    "git": {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 32}},
    "xmod": {"default_language": "en_XX"},
    "cpmant": {"prompt_length": 4, "prompt_types": 1, "segment_types": 1, "dim_head": 16},
}


@dataclass(frozen=True)
class Outcome:
    """What came of a family.

    Attributes:
        status: "works"; "in part", on some layers or under some policies only; "no span", where no layer of the tiny
            model can be looped, for its type; "refused", whatever the span; "untried", where there is no tiny model to
            try, or the native one fails by itself.
        reason: why it does not simply work; empty where it does.
    """

    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class WrongError(AssertionError):
    """A family was converted and computes something else than its spec says."""


def walk(family: str, directory: Path) -> Outcome:
    """Try one family; `directory` must be empty.

    Raises:
        WrongError: the export is not exact.
    """
    try:
        config = tiny_config(family)
        refusal = _why_refused(family, config)
        if refusal:
            return Outcome("refused", refusal)
        base = _save_base(config, directory / "base")
    except Exception as error:  # whatever a foreign class raises at a size that it was not made for
        return Outcome("untried", _one_line(error))
    try:
        return _try_spans(base, directory)
    except Exception:  # ours to answer for, unless the base itself does no better
        reason = why_base_cannot_decode(base)
        if reason:
            return Outcome("untried", reason)
        raise


def _try_spans(base: Path, directory: Path) -> Outcome:
    """The middle of the model and all policies; where that is refused, any single layer, then `shared` alone."""
    reasons = []
    for kvs in (KV_POLICIES, ("shared",)):
        for span in ((2, 4), *((start, start + 1) for start in range(6))):
            try:
                check_exact(base, span, directory, kvs)
            except ValueError as refusal:
                reasons.append(_one_line(refusal))
            else:
                return Outcome("in part", reasons[0]) if reasons else Outcome("works")
    by_layer = " is of type " in reasons[0] or " keeps more of the past " in reasons[0]
    return Outcome("no span" if by_layer else "refused", reasons[0])


def check_exact(base: Path, span: tuple[int, int], directory: Path, kvs=KV_POLICIES, *, decodes=True) -> None:
    """Convert and hold the export to all that holds for every family.

    Args:
        base: the checkpoint.
        span: what to loop.
        directory: where to write exports.
        kvs: the K/V policies to try.
        decodes: whether the base's own cached decoding equals its full forward, so that the looped one has to.

    Raises:
        ValueError: the conversion, or the model when it is loaded, refuses.
        WrongError: something does not hold.
    """
    tokens = _tokens()
    plain = _load(base)
    natural = _full(plain, tokens)
    for kv in kvs:
        out = directory / f"{kv}-{'-'.join(map(str, span))}"
        try:
            loopexport.convert(str(base), out, span=span, steps=STEPS, kv=kv, weights="hardlink", overwrite=True)
        except loopexport.LoopExportError as error:
            raise ValueError(str(error)) from None
        model = _load(out)
        full = _full(model, tokens)
        if kv == "per_step":
            _require_close("a full forward and the replay by hand", full, looped_by_hand(plain, tokens, span))
        if decodes:
            _require_close("cached decoding and the full forward", _decoded(model, tokens), full)
        _require(_relative(full, natural) > SMALLEST_EFFECT, "the loop changes nothing")
        model.config.loop_steps = 1
        _require(torch.equal(_full(model, tokens), natural), "one step is not the base")


@torch.no_grad()
def looped_by_hand(model, tokens: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """Logits of damped looping in block mode, every pass with its own keys and values, by replaying recorded calls."""
    layers = _layers(model)
    calls = _recorded_calls(model, layers, tokens)

    def run(start, stop, h):
        for index in range(start, stop):
            args, kwargs = calls[index]
            output = layers[index](h, *args[1:], **kwargs) if args else layers[index](**{**kwargs, "hidden_states": h})
            h = output[0] if isinstance(output, tuple) else output
        return h

    h = calls[span[0]][0][0] if calls[span[0]][0] else calls[span[0]][1]["hidden_states"]
    for _ in range(STEPS):
        h = h + (run(*span, h) - h) / STEPS
    last = run(span[1], len(layers), h)
    hook = layers[-1].register_forward_hook(lambda _, args, out: (last, *out[1:]) if isinstance(out, tuple) else last)
    try:
        return _full(model, tokens)
    finally:
        hook.remove()


def _recorded_calls(model, layers, tokens) -> dict[int, tuple[tuple, dict]]:
    calls: dict[int, tuple[tuple, dict]] = {}

    def recorder(index):
        return lambda _, args, kwargs: calls.__setitem__(index, (args, dict(kwargs)))

    hooks = [layer.register_forward_pre_hook(recorder(i), with_kwargs=True) for i, layer in enumerate(layers)]
    _full(model, tokens)
    for hook in hooks:
        hook.remove()
    return calls


def _layers(model) -> list[torch.nn.Module]:
    """The decoder's layers: the outermost module list of the right length."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0])


def why_base_cannot_decode(base: Path) -> str:
    """Why the native model gives nothing to compare cached decoding with; empty where it does."""
    model, tokens = _load(base), _tokens()
    try:
        difference = _relative(_decoded(model, tokens), _full(model, tokens))
    except Exception as error:
        return f"the base itself cannot decode with a cache here: {_one_line(error)}"
    return f"cached decoding of the base itself is off by {difference:.2g}" if difference > TOLERANCE else ""


def _tokens() -> torch.Tensor:
    return torch.randint(3, 131, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _load(path: Path):
    model, loading = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    wrong = [key for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[keys]]
    _require(not wrong, f"keys go amiss: {wrong[:2]}")
    return model.eval()


@torch.no_grad()
def _full(model, tokens):
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def _decoded(model, tokens):
    output = model(tokens[:, :PREFILL], use_cache=True)
    parts = [output.logits]
    for position in range(PREFILL, LENGTH):
        step = tokens[:, position : position + 1]
        output = model(step, past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def _relative(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def _require_close(what: str, ours, theirs) -> None:
    difference = _relative(ours, theirs)
    _require(difference <= TOLERANCE, f"{what} differ by {difference:.2g} of scale")


# ---------------------------------------------------------------------------------------------------------------------
# Tiny bases.
# ---------------------------------------------------------------------------------------------------------------------


def tiny_config(family: str, **overrides):
    """A tiny config of any family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = CONFIG_MAPPING[family]()
    fields = {
        *vars(default),
        *inspect.signature(type(default).__init__).parameters,
        *getattr(default, "attribute_map", {}),
    }
    values = {**TINY, **(MLA if "kv_lora_rank" in fields else {})}
    values = {name: value for name, value in values.items() if name in fields}
    return AutoConfig.for_model(family, **{**values, **SPECIAL.get(family, {}), **overrides})


def save_tiny_family(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny random base of any family."""
    return _save_base(tiny_config(family, **overrides), directory)


def _save_base(config, directory: Path) -> Path:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its tiny model has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # wide enough for a loop to show, whatever the family starts with
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def _why_refused(family: str, config) -> str:
    """Why `config.json` alone gets the family refused; empty where it does not."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    values = {**config.to_dict(), "architectures": [name if isinstance(name, str) else name[0]]}
    try:
        families.check_family(values)
    except loopexport.LoopExportError as error:
        return _one_line(error)
    return ""


def _one_line(error: Exception) -> str:
    """The first line, without what differs between two families that fail alike."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"layer \d+", "a layer", lines[0] if lines else type(error).__name__)[:200]


def walk_all() -> dict[str, str]:
    """The outcome of every family of the installed transformers, with recorded refusals left out of account."""
    outcomes = {}
    with mock.patch.object(families, "outcomes", return_value={}):
        for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            with tempfile.TemporaryDirectory() as directory:
                outcomes[family] = str(walk(family, Path(directory)))
            print(f"{family}: {outcomes[family]}", flush=True)
    return outcomes


def main() -> None:
    """Put the installed release's outcomes beside those of others in `loopexport/base/families.json`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    recorded = json.loads(families.FILE.read_text()) if families.FILE.exists() else {}
    for record in recorded.values():
        record.pop(RELEASE, None)
    for family, outcome in walk_all().items():
        recorded.setdefault(family, {})[RELEASE] = outcome
    recorded = {family: dict(sorted(record.items())) for family, record in sorted(recorded.items()) if record}
    families.FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
