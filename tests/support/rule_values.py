"""Fields that make each update rule possible."""

from __future__ import annotations

STEPS = 4
# What a rule cannot do without, or does not do by default.
VALUES = {
    "ema_sched": {"schedule": (0.5, 0.4, 0.2, 0.1)},
    "poly_blend": {"schedule": (0.1, 0.4, 0.3, 0.1, 0.1)},
}
