"""The code files that `convert` copies byte for byte into every export; they import nothing from LoopExport.

transformers loads `configuration_looped` (the config classes) and `modeling_looped` (the model classes) by name, and
most of the other files through them. mlx-lm loads `modeling_looped_mlx` if the config names it.
"""

FILES = (
    "configuration_looped.py",
    "looped_arguments.py",
    "looped_body.py",
    "looped_cache.py",
    "looped_call.py",
    "looped_checkpointing.py",
    "looped_decoder.py",
    "looped_fields.py",
    "looped_fit.py",
    "looped_path.py",
    "looped_mlx.py",
    "looped_mlx_limits.py",
    "looped_mlx_model.py",
    "looped_mlx_routing.py",
    "looped_pools.py",
    "looped_recurrent.py",
    "looped_routing.py",
    "looped_rules.py",
    "looped_spec.py",
    "looped_states.py",
    "looped_vllm.py",
    "looped_vllm_limits.py",
    "looped_vllm_settings.py",
    "looped_walk.py",
    "modeling_looped.py",
    "modeling_looped_mlx.py",
)
