"""Try every family of causal language models in the installed transformers: can it be looped, and is the loop exact?

For each family, make a tiny random base, convert it, load it, and check what holds for every family: no missing or
unexpected keys; one step is bitwise the base; a full forward under `per_step` equals a replay of the base's own layers
by hand; cached decoding equals a full forward; gradient checkpointing changes no gradient.

    PYTHONPATH=tests python -m support.family_walk

writes the outcomes into `loopexport/base/families.json`, the source of the families table and of `convert`'s refusals.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
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
from support.compare import LARGEST, TOLERANCE
from support.forwards import full_forward

RELEASE = ".".join(__version__.split(".")[:2])
SMALLEST_EFFECT = 1e-4  # of the logits' scale; if a loop changes less, the other checks prove nothing
GRADIENT_TOLERANCE = 1e-4  # of a gradient's largest value
STEPS = 3
MODES = ("block", "layer")
KV_POLICIES = ("per_step", "shared")
PREFILL, LENGTH = 5, 9
MAX_PARAMETERS = 50_000_000

# Values for the fields of these names, in every config that has them.
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
# Further values that a family needs to exist at this size.
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
    """The outcome of trying one family.

    Attributes:
        status: "works"; "in part": only on some layers or under some policies; "no span": the type of each layer of the
            tiny model prevents a loop; "refused": no span can work; "untried": there is no tiny model, or the native
            model itself fails.
        reason: why the status is not "works"; else empty.
    """

    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class WrongError(AssertionError):
    """An export computes something else than its spec says."""


def walk(family: str, directory: Path) -> Outcome:
    """Try one family; `directory` must be empty.

    Raises:
        WrongError: the export is not exact, which is a bug in LoopExport.
    """
    try:
        config = tiny_family_config(family)
        refusal = _why_refused(family, config)
        if refusal:
            return Outcome("refused", refusal)
        base = _save_base(config, directory / "base")
    except Exception as error:  # a class of transformers may raise anything at a size that it was not made for
        return Outcome("untried", one_line(error))
    try:
        return _try_spans(base, directory)
    except Exception:  # our bug, unless the base itself fails too
        reason = why_base_cannot_decode(base)
        if reason:
            return Outcome("untried", reason)
        raise


def _try_spans(base: Path, directory: Path) -> Outcome:
    """Try the middle of the model under all policies; if refused, single layers; if refused again, `shared` alone."""
    reasons = []
    for kvs in (KV_POLICIES, ("shared",)):
        for span in ((2, 4), *((start, start + 1) for start in range(6))):
            try:
                check_exact(base, span, directory, kvs)
            except ValueError as refusal:
                reasons.append(one_line(refusal))
            else:
                return Outcome("in part", reasons[0]) if reasons else Outcome("works")
    by_layer = " is of type " in reasons[0] or " keeps more of the past " in reasons[0]
    return Outcome("no span" if by_layer else "refused", reasons[0])


def check_exact(base: Path, span: tuple[int, int], directory: Path, kvs=KV_POLICIES, *, decodes=True) -> None:
    """Convert, and check all that holds for every family.

    Args:
        base: the checkpoint.
        span: the layers to loop, half-open.
        directory: where to write exports.
        kvs: the K/V policies to try.
        decodes: whether cached decoding must equal a full forward, because it does so in the base.

    Raises:
        ValueError: the conversion, or the model while it loads, refuses.
        WrongError: a check fails.
    """
    tokens = _tokens()
    plain = _load(base)
    natural = full_forward(plain, tokens)
    for kv in kvs:
        out = directory / f"{kv}-{'-'.join(map(str, span))}"
        try:
            loopexport.convert(str(base), out, span=span, steps=STEPS, kv=kv, weights="hardlink", overwrite=True)
        except loopexport.LoopExportError as error:
            raise ValueError(str(error)) from None
        model = _load(out)
        full = full_forward(model, tokens)
        if kv == "per_step":
            _require_close("a full forward and the replay by hand", full, looped_by_hand(plain, tokens, span))
        if decodes:
            _require_close("cached decoding and the full forward", _decoded(model, tokens), full)
        _require(_relative(full, natural) > SMALLEST_EFFECT, "the loop changes nothing")
        if kv == kvs[0] and _checkpointing_difference(_load(base)) <= GRADIENT_TOLERANCE:
            _check_gradients(_load(out))
        model.config.loop_steps = 1
        _require(torch.equal(full_forward(model, tokens), natural), "one step is not the base")


def _check_gradients(model) -> None:
    """Gradients with and without checkpointing are equal, or checkpointing is refused, for each mode and policy."""
    for mode, kv in itertools.product(MODES, (*KV_POLICIES, "reference")):
        model.config.loop_mode, model.config.loop_kv = mode, kv
        difference = _checkpointing_difference(model)
        _require(
            difference <= GRADIENT_TOLERANCE,
            f"mode {mode}, kv {kv}: checkpointing changes gradients by {difference:.2g}",
        )


def _checkpointing_difference(model) -> float:
    """How far gradients with checkpointing are from those without, of their scale; infinite if the base has none."""
    try:
        plain = _gradients(model.train())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = _gradients(model)
    except ValueError:  # refused, by transformers or by us
        return 0.0 if hasattr(model.config, "loop_steps") else math.inf
    finally:
        model.gradient_checkpointing_disable()
    return max((_relative(checkpointed[name], plain[name]) for name in plain), default=math.inf)


def _gradients(model) -> dict[str, torch.Tensor]:
    """The gradients of a loss, by parameter; those that are not about zero."""
    model.zero_grad()
    torch.manual_seed(0)  # for dropout, and routers with noise
    model(_tokens(), labels=_tokens(), use_cache=False).loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    largest = max((each.abs().max().item() for each in found.values()), default=0.0)
    return {name: each for name, each in found.items() if each.abs().max() > 1e-4 * largest}


@torch.no_grad()
def looped_by_hand(model, tokens: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """Logits of damped looping in block mode by replaying recorded calls; every pass has its own keys and values."""
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
        return full_forward(model, tokens)
    finally:
        hook.remove()


def _recorded_calls(model, layers, tokens) -> dict[int, tuple[tuple, dict]]:
    calls: dict[int, tuple[tuple, dict]] = {}

    def recorder(index):
        return lambda _, args, kwargs: calls.__setitem__(index, (args, dict(kwargs)))

    hooks = [layer.register_forward_pre_hook(recorder(i), with_kwargs=True) for i, layer in enumerate(layers)]
    full_forward(model, tokens)
    for hook in hooks:
        hook.remove()
    return calls


def _layers(model) -> list[torch.nn.Module]:
    """The decoder's layers: the first module list of the right length."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0])


def why_base_cannot_decode(base: Path) -> str:
    """Why cached decoding of the native model is no reference; empty if it is one."""
    model, tokens = _load(base), _tokens()
    try:
        difference = _relative(_decoded(model, tokens), full_forward(model, tokens))
    except Exception as error:
        return f"the base itself cannot decode with a cache here: {one_line(error)}"
    return f"cached decoding of the base itself is off by {difference:.2g}" if difference > TOLERANCE else ""


def _tokens() -> torch.Tensor:
    return torch.randint(3, 131, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _load(path: Path):
    model, keys = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in keys[kind]]
    _require(not wrong, f"missing, unexpected or mismatched keys, the first of them {wrong[:2]}")
    return model.eval()


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
    LARGEST.append(difference)
    _require(difference <= TOLERANCE, f"{what} differ by {difference:.2g} of scale")


# ---------------------------------------------------------------------------------------------------------------------
# Tiny bases.
# ---------------------------------------------------------------------------------------------------------------------


def tiny_family_config(family: str, **overrides):
    """A tiny config of any family; `support.tiny` has richer ones of a few families."""
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
    return _save_base(tiny_family_config(family, **overrides), directory)


def _save_base(config, directory: Path) -> Path:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its tiny model has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # large enough for a loop to show, whatever the family starts with
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def _why_refused(family: str, config) -> str:
    """Why the family is refused for its `config.json` alone; empty if it is not."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    values = {**config.to_dict(), "architectures": [name if isinstance(name, str) else name[0]]}
    try:
        families.check_family(values)
    except loopexport.LoopExportError as error:
        return one_line(error)
    return ""


def one_line(error: Exception) -> str:
    """The first line of an error, with layer numbers removed: they differ between families that fail alike."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"layer \d+", "a layer", lines[0] if lines else type(error).__name__)[:200]


def walk_all() -> dict[str, str]:
    """The outcome of every family of the installed transformers; recorded refusals are ignored."""
    outcomes = {}
    with mock.patch.object(families, "outcomes", return_value={}):
        for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            with tempfile.TemporaryDirectory() as directory:
                outcomes[family] = str(walk(family, Path(directory)))
            print(f"{family}: {outcomes[family]}", flush=True)
    return outcomes


def main() -> None:
    """Write the outcomes on the installed release into `families.json`; keep those on other releases."""
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
