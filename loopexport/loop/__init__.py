"""The loop: what a spec says, what it costs, what was published about it, and how to put it in words."""
