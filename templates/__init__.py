"""The files that every export carries, byte for byte; they import nothing of LoopExport.

`modeling_looped` makes the model classes, `configuration_looped` the config classes: transformers loads those two by
name, and with them the others, which have one subject each.
"""

FILES = (
    "configuration_looped.py",
    "looped_cache.py",
    "looped_routing.py",
    "looped_rules.py",
    "looped_spec.py",
    "looped_vllm.py",
    "looped_vllm_limits.py",
    "looped_walk.py",
    "modeling_looped.py",
)
