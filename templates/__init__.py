"""The two files that every export carries, byte for byte; they import nothing of LoopExport."""

FILES = ("configuration_looped.py", "modeling_looped.py")
