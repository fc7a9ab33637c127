"""What the walks check of an export of any family: `check_exact`, for a kind of models and prompts."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, __version__

import loopexport
from support.compare import LARGEST, TOLERANCE

RELEASE = ".".join(__version__.split(".")[:2])
SMALLEST_EFFECT = 1e-4  # of the logits' scale; if a loop changes less, the other checks prove nothing
GRADIENT_TOLERANCE = 1e-4  # of a gradient's largest value
STEPS = 3
MODES = ("block", "layer")
KV_POLICIES = ("per_step", "shared")
PREFILL, LENGTH = 5, 9


@dataclass(frozen=True)
class Outcome:
    """The outcome of trying one family.

    Attributes:
        status: "works"; "in part": only on some layers or under some policies; "no span": the type of each layer of the
            tiny model prevents a loop; "refused": no span can work; "untried": there is no tiny model or no input for
            it, or the native model itself fails.
        reason: why the status is not "works"; else empty.
    """

    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class WrongError(AssertionError):
    """An export computes something else than its spec says."""


class TextCase:
    """How models that read text alone are loaded, prompted and decoded."""

    auto = AutoModelForCausalLM

    def load(self, path: Path):
        """The model in a directory. WrongError if its weights do not fit, or if it is not for the Auto class."""
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        known = type(config) in self.auto._model_mapping or self.auto.__name__ in getattr(config, "auto_map", {})
        require(known, f"the export does not load with {self.auto.__name__}, as the base does")
        model, keys = self.auto.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in keys[kind]]
        require(not wrong, f"missing, unexpected or mismatched keys, the first of them {wrong[:2]}")
        return model.eval()

    def prompts(self) -> list[dict]:
        """The arguments of some forwards."""
        return [{"input_ids": torch.randint(3, 131, (2, LENGTH), generator=torch.Generator().manual_seed(1))}]

    @torch.no_grad()
    def full(self, model, prompt: dict) -> torch.Tensor:
        """The logits of one forward without a cache."""
        return model(**prompt, use_cache=False).logits

    @torch.no_grad()
    def decoded(self, model, prompt: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of a prefill and one forward for each later token, and the same from one forward."""
        tokens = prompt["input_ids"]
        output = model(tokens[:, :PREFILL], use_cache=True)
        parts = [output.logits]
        for position in range(PREFILL, LENGTH):
            step = tokens[:, position : position + 1]
            output = model(step, past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
        return torch.cat(parts, dim=1), self.full(model, prompt)

    def padded(self, model) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The logits of a prompt behind padding, and without it; None if the kind has no such check."""
        return None


TEXT = TextCase()


def try_spans(base: Path, directory: Path, case: TextCase = TEXT) -> Outcome:
    """Try the middle of the model under all policies; if refused, single layers; if refused again, `shared` alone."""
    reasons = []
    for kvs in (KV_POLICIES, ("shared",)):
        for span in ((2, 4), *((start, start + 1) for start in range(6))):
            try:
                check_exact(base, span, directory, kvs, case=case)
            except ValueError as refusal:
                reasons.append(one_line(refusal))
            else:
                return Outcome("in part", reasons[0]) if reasons else Outcome("works")
    by_layer = " is of type " in reasons[0] or " keeps more of the past " in reasons[0]
    return Outcome("no span" if by_layer else "refused", reasons[0])


def check_exact(
    base: Path, span: tuple[int, int], directory: Path, kvs=KV_POLICIES, *, decodes=True, case: TextCase = TEXT
) -> None:
    """Convert, and check all that holds for every family.

    Args:
        base: the checkpoint.
        span: the layers to loop, half-open.
        directory: where to write exports.
        kvs: the K/V policies to try.
        decodes: whether cached decoding must equal a full forward, because it does so in the base.
        case: how its models are loaded, prompted and decoded.

    Raises:
        ValueError: the conversion, or the model while it loads, refuses.
        WrongError: a check fails.
    """
    plain = case.load(base)
    prompts = case.prompts()
    natural = [case.full(plain, prompt) for prompt in prompts]
    for kv in kvs:
        model = case.load(_converted(base, span, directory, kv))
        for prompt, base_logits in zip(prompts, natural, strict=True):
            _check_forward(case, model, prompt, plain if kv == "per_step" else None, span)
            if decodes:
                _require_close("cached decoding and the full forward", *case.decoded(model, prompt))
            effect = relative(case.full(model, prompt), base_logits)
            require(effect > SMALLEST_EFFECT, "the loop changes nothing")
        _check_padded(case, model, plain)
        if kv == kvs[0] and _checkpointing_difference(case, case.load(base)) <= GRADIENT_TOLERANCE:
            _check_gradients(case, case.load(_converted(base, span, directory, kv)))
        model.config.loop_steps = 1
        for prompt, base_logits in zip(prompts, natural, strict=True):
            require(torch.equal(case.full(model, prompt), base_logits), "one step is not the base")


def _converted(base: Path, span: tuple[int, int], directory: Path, kv: str) -> Path:
    out = directory / f"{kv}-{'-'.join(map(str, span))}"
    if not out.exists():
        try:
            loopexport.convert(str(base), out, span=span, steps=STEPS, kv=kv, weights="hardlink")
        except loopexport.LoopExportError as error:
            raise ValueError(str(error)) from None
    return out


def _check_forward(case: TextCase, model, prompt: dict, plain, span: tuple[int, int]) -> None:
    """A full forward equals the replay by hand, if there is a plain model to replay on."""
    if plain is not None:
        by_hand = looped_by_hand(case, plain, prompt, span)
        _require_close("a full forward and the replay by hand", case.full(model, prompt), by_hand)


def _check_padded(case: TextCase, model, plain) -> None:
    """Padding changes no logits, if it changes none of the base's."""
    expected = case.padded(plain)
    if expected is None or relative(*expected) > TOLERANCE:
        return
    padded = case.padded(model)
    assert padded is not None
    _require_close("a prompt behind padding and without it", *padded)


def _check_gradients(case: TextCase, model) -> None:
    """Gradients with and without checkpointing are equal, or checkpointing is refused, for each mode and policy."""
    for mode, kv in itertools.product(MODES, (*KV_POLICIES, "reference")):
        model.config.loop_mode, model.config.loop_kv = mode, kv
        difference = _checkpointing_difference(case, model)
        require(
            difference <= GRADIENT_TOLERANCE,
            f"mode {mode}, kv {kv}: checkpointing changes gradients by {difference:.2g}",
        )


def _checkpointing_difference(case: TextCase, model) -> float:
    """How far gradients with checkpointing are from those without, of their scale; infinite if the base has none."""
    try:
        plain = _gradients(case, model.train())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = _gradients(case, model)
    except ValueError:  # refused, by transformers or by us
        return 0.0 if hasattr(model.config, "loop_steps") else math.inf
    finally:
        model.gradient_checkpointing_disable()
    return max((relative(checkpointed[name], plain[name]) for name in plain), default=math.inf)


def _gradients(case: TextCase, model) -> dict[str, torch.Tensor]:
    """The gradients of a loss, by parameter; those that are not about zero."""
    model.zero_grad()
    torch.manual_seed(0)  # for dropout, and routers with noise
    prompt = case.prompts()[0]
    model(**prompt, labels=prompt["input_ids"], use_cache=False).loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    largest = max((each.abs().max().item() for each in found.values()), default=0.0)
    return {name: each for name, each in found.items() if each.abs().max() > 1e-4 * largest}


@torch.no_grad()
def looped_by_hand(case: TextCase, model, prompt: dict, span: tuple[int, int]) -> torch.Tensor:
    """Logits of damped looping in block mode by replaying recorded calls; every pass has its own keys and values.

    What the model adds between two layers, such as the image features of Qwen3-VL, every pass adds.
    """
    layers = layers_of(model)
    calls, outputs = _recorded_calls(case, model, layers, prompt)
    called = sorted(calls)  # Mllama skips layers that attend to an image where there is none
    added = {here: _input(calls[here]) - outputs[before] for before, here in itertools.pairwise(called)}

    def run(indices, h):
        for position, index in enumerate(indices):
            args, kwargs = calls[index]
            h = h + added[index] if position and added[index].any() else h
            output = layers[index](h, *args[1:], **kwargs) if args else layers[index](**{**kwargs, "hidden_states": h})
            h = _hidden(output)
        return h

    looped, behind = [i for i in called if span[0] <= i < span[1]], [i for i in called if i >= span[1]]
    h = _input(calls[looped[0]])
    for _ in range(STEPS):
        h = h + (run(looped, h) - h) / STEPS
    last = run(behind, h + added[behind[0]]) if behind else h
    hook = layers[-1].register_forward_hook(lambda _, args, out: (last, *out[1:]) if isinstance(out, tuple) else last)
    try:
        return case.full(model, prompt)
    finally:
        hook.remove()


def _recorded_calls(case: TextCase, model, layers, prompt: dict) -> tuple[dict[int, tuple], dict[int, torch.Tensor]]:
    """The arguments of each layer, and its output hidden states."""
    calls: dict[int, tuple[tuple, dict]] = {}
    outputs: dict[int, torch.Tensor] = {}

    def record(index):
        def hook(_, args, kwargs, output):
            calls[index], outputs[index] = (args, dict(kwargs)), _hidden(output).clone()

        return hook

    hooks = [layer.register_forward_hook(record(i), with_kwargs=True) for i, layer in enumerate(layers)]
    case.full(model, prompt)
    for hook in hooks:
        hook.remove()
    return calls, outputs


def changed_between_layers(case: TextCase, model) -> list[int]:
    """The layers in front of which the model changes the hidden states, for the first prompt."""
    calls, outputs = _recorded_calls(case, model, layers_of(model), case.prompts()[0])
    pairs = itertools.pairwise(sorted(calls))
    return [here for before, here in pairs if not torch.equal(_input(calls[here]), outputs[before])]


def _input(call: tuple[tuple, dict]) -> torch.Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _hidden(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def layers_of(model) -> list[torch.nn.Module]:
    """The decoder's layers: the first module list of the right length."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0])


def why_base_cannot_decode(base: Path, case: TextCase = TEXT) -> str:
    """Why cached decoding of the native model is no reference; empty if it is one."""
    model = case.load(base)
    try:
        for prompt in case.prompts():
            case.full(model, prompt)
    except Exception as error:
        return f"the base itself fails here: {one_line(error)}"
    try:
        difference = max(relative(*case.decoded(model, prompt)) for prompt in case.prompts())
    except Exception as error:
        return f"the base itself cannot decode with a cache here: {one_line(error)}"
    return f"cached decoding of the base itself is off by {difference:.2g}" if difference > TOLERANCE else ""


def one_line(error: Exception) -> str:
    """The first line of an error, with layer numbers removed: they differ between families that fail alike."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"layer \d+", "a layer", lines[0] if lines else type(error).__name__)[:200]


def relative(ours, theirs) -> float:
    """The largest difference, of the scale of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def require(holds: bool, what: str) -> None:
    """Raise WrongError unless something holds."""
    if not holds:
        raise WrongError(what)


def _require_close(what: str, ours, theirs) -> None:
    difference = relative(ours, theirs)
    LARGEST.append(difference)
    require(difference <= TOLERANCE, f"{what} differ by {difference:.2g} of scale")
