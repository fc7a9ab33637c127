"""The code files that `convert` copies byte for byte into every export; they import nothing from LoopExport.

transformers loads `configuration_looped` (the config classes) and `modeling_looped` (the model classes) by name, and
the other files through them.
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
)
