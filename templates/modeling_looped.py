"""A language model whose middle layers are applied several times, in small damped steps, without training.

Every export has a copy of this file and of the files that it imports. They need only torch and transformers. The model
class is a subclass of the native model of the base's family. It changes one thing: what the decoder's own forward finds
in its layer list. Weights, parameter names, masks, position embeddings and the forward are the native model's. In a
multimodal model, that decoder is the one of its language model; vision and audio towers are the native ones.

This file makes the model classes. `looped_decoder` lets the native forward walk over visits instead of layers,
`looped_walk` runs such a forward, `looped_rules` computes the iterates, `looped_cache` decides what they attend to,
`looped_routing` which experts they use. `looped_spec` defines the fields of the loop. `looped_vllm` is used only under
vLLM.

Source: "Training-Free Looped Transformers" (arXiv 2605.23872).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
)

from .configuration_looped import (
    CLASS_PREFIX,
    HEADS,
    MULTIMODAL_HEADS,
    base_model_type,
    family_name,
    looped_config_class,
    multimodal_mappings,
)
from .looped_arguments import CACHE_ARGUMENTS, self_attention
from .looped_body import Body  # noqa: F401  transformers 4 copies only files that this one imports
from .looped_cache import add_slots
from .looped_call import LayerCall  # noqa: F401  as above
from .looped_checkpointing import CHECKPOINTS  # noqa: F401  as above
from .looped_decoder import LOOP, loop_decoder
from .looped_fields import MAX_COUNT  # noqa: F401  as above
from .looped_fit import check_continuous_batching, check_depth  # noqa: F401  as above
from .looped_path import layers_of  # noqa: F401  as above
from .looped_pools import POOLS  # noqa: F401  as above
from .looped_recurrent import SCANS  # noqa: F401  as above
from .looped_routing import ROUTERS  # noqa: F401  as above
from .looped_rules import run_loop  # noqa: F401  as above
from .looped_spec import LoopSpec
from .looped_states import HAS_STATE  # noqa: F401  as above
from .looped_vllm import VLLM_IMPLEMENTATIONS, serve_on_vllm
from .looped_vllm_limits import vllm_refusal  # noqa: F401  as above
from .looped_vllm_settings import check_vllm  # noqa: F401  as above
from .looped_walk import Walk  # noqa: F401  as above

if TYPE_CHECKING:  # only mlx-lm runs these; `save_pretrained` copies all files that such lines name
    from .looped_mlx import Loop  # noqa: F401
    from .looped_mlx_limits import MODEL_FILE  # noqa: F401
    from .looped_mlx_model import looped_model  # noqa: F401
    from .looped_mlx_routing import routers_of  # noqa: F401
    from .modeling_looped_mlx import Model  # noqa: F401

# transformers 4 runs a changed file again in the same module: forget the classes that the other version made.
for _name in [each for each in globals() if each.startswith(CLASS_PREFIX)]:
    del globals()[_name]


class LoopedModelMixin:
    """Turns a native model into a looped one, after the native constructor has built its layers.

    Attributes:
        native_class: the native model class.
    """

    native_class: type

    def __init__(self, config, *inputs, **kwargs):
        text_config = config.get_text_config(decoder=True)
        has_body = type(config).native_config_class in MODEL_MAPPING
        if has_body and type(config) not in MODEL_MAPPING:  # a head may make its body by AutoModel
            body = f"{CLASS_PREFIX}{family_name(base_model_type(config.model_type))}Model"
            MODEL_MAPPING.register(type(config), getattr(sys.modules[__name__], body), exist_ok=True)
        super().__init__(config, *inputs, **kwargs)
        language_model = find_language_model(self.base_model, text_config)
        decoder, list_name = find_layers(language_model, text_config.num_hidden_layers)
        if LOOP in vars(decoder):  # this head let AutoModel make its body, and that is looped already
            return
        loop = loop_decoder(decoder, list_name, config, self.native_class if decoder is self else None)
        layers = loop.layers_of(decoder)
        spec = loop.checked_spec(layers)
        if text_config._attn_implementation in VLLM_IMPLEMENTATIONS:  # of a multimodal model, vLLM sets it there alone
            serve_on_vllm(self, loop, layers, spec)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the native class initialises what a checkpoint lacks.

        For custom code, transformers 5 skips modules without parameters, and Falcon-H1's decoder, which is one,
        initialises buffers of its layers.
        """
        return False


class LoopedGenerationMixin:
    """What `generate` needs to know, for models that generate."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Also add the slots of `per_step`, before a compiled prefill would have to."""
        answer = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        spec = LoopSpec.from_config(self.config)
        cache = next((model_kwargs[name] for name in CACHE_ARGUMENTS if model_kwargs.get(name) is not None), None)
        if cache is not None and spec.has_extra_slots:
            add_slots(self_attention(cache), spec, self.config.get_text_config(decoder=True).num_hidden_layers)
        return answer

    def init_continuous_batching(self, *args, **kwargs):
        """The native manager of continuous batching.

        Raises:
            ValueError: the loop is not exact there; use `generate`.
        """
        check_continuous_batching(LoopSpec.from_config(self.config))
        return super().init_continuous_batching(*args, **kwargs)


def find_language_model(model: nn.Module, text_config) -> nn.Module:
    """The language model in a native model: the outermost module with a config of the type of `text_config`.

    A vision or audio tower may have as many layers, so the number of layers alone would not do.
    """
    return next((each for each in model.modules() if type(getattr(each, "config", None)) is type(text_config)), model)


def find_layers(model: nn.Module, num_layers: int) -> tuple[nn.Module, str]:
    """The module that owns the decoder's layer list, and its attribute for it.

    The list is the only outermost ModuleList of `num_layers` modules.
    """
    lists = [
        (path.count("."), path)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    depth = min((depth for depth, _ in lists), default=None)
    outermost = [path for each, path in lists if each == depth]
    if len(outermost) != 1:
        raise ValueError(
            f"cannot loop {type(model).__name__}: it has {len(outermost)} lists of {num_layers} layers, not one"
        )
    owner, _, list_name = outermost[0].rpartition(".")
    return model.get_submodule(owner), list_name


# The native classes by config class, for each end of a name in `configuration_looped.HEADS` and `MULTIMODAL_HEADS`.
MAPPINGS: dict[str, list] = {
    "ForCausalLM": [MODEL_FOR_CAUSAL_LM_MAPPING],
    "ForConditionalGeneration": multimodal_mappings(),
    "ForSequenceClassification": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING],
    "ForTokenClassification": [MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING],
    "ForQuestionAnswering": [MODEL_FOR_QUESTION_ANSWERING_MAPPING],
    "Model": [MODEL_MAPPING],
}


def __getattr__(name: str) -> type:
    """Make `Looped<Family><Head>` when `auto_map` or pickle first looks it up."""
    for head in MAPPINGS:
        if name.startswith(CLASS_PREFIX) and name.endswith(head):
            model_class = _looped_class(name, name[len(CLASS_PREFIX) : -len(head)], head)
            globals()[name] = model_class
            return model_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _looped_class(name: str, family: str, head: str) -> type:
    config_class = looped_config_class(family)
    native = _native_class(config_class.native_config_class, head)
    if native is None:
        raise AttributeError(
            f"{family} has no class of this kind in transformers, so there is no {name}; use "
            f"{_auto_classes(config_class.native_config_class)}"
        )
    mixins = (LoopedModelMixin, *([LoopedGenerationMixin] if issubclass(native, GenerationMixin) else []))
    body = {"native_class": native, "config_class": config_class, "__module__": __name__, "__qualname__": name}
    looped = type(name, (*mixins, native), body)
    _load_as_native(native, looped)
    _quantise_as_native(looped.config_class.model_type)
    return looped


def _native_class(config_class: type, head: str) -> type | None:
    return next((mapping[config_class] for mapping in MAPPINGS[head] if config_class in mapping), None)


def _auto_classes(config_class: type) -> str:
    """The Auto classes that a family has, for an error message."""
    heads = {**HEADS, **MULTIMODAL_HEADS}
    return " or ".join(auto for auto, head in heads.items() if _native_class(config_class, head) is not None)


def _load_as_native(native: type, looped: type) -> None:
    """Let transformers 5 load, save and run the experts of the looped class like those of the native class.

    transformers fuses expert weights by a table of model types that has no looped types. It also decides once, from the
    source of a class, whether faster attention and experts may run. Without this, both go wrong silently.
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:  # transformers 4
        return
    model_type = looped.config_class.model_type
    for ours, theirs in ((model_type, base_model_type(model_type)), (looped.__name__, native.__name__)):
        conversion = get_checkpoint_conversion_mapping(theirs)
        if conversion is not None:
            register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)
    for name in ("attn", "experts"):
        answer = getattr(native, f"_can_set_{name}_implementation", None)
        if answer is not None:
            setattr(looped, f"_can_set_{name}_implementation_cached_value", answer())


def _quantise_as_native(model_type: str) -> None:
    """Let transformers scale and fuse AWQ modules, whose tables it looks up by model type, like the native model's."""
    try:
        from transformers.integrations import awq
    except ImportError:
        return
    for name in ("AWQ_SCALES_MAPPINGS", "AWQ_FUSED_MAPPINGS"):
        table = getattr(awq, name, {})
        if base_model_type(model_type) in table:
            table[model_type] = table[base_model_type(model_type)]
