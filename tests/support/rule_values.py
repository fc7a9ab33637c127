"""The fields that some update rules need."""

from __future__ import annotations

STEPS = 4
# By rule: fields that it needs, or without which it equals another rule.
VALUES = {
    "ema_sched": {"schedule": (0.5, 0.4, 0.2, 0.1)},
    "poly_blend": {"schedule": (0.1, 0.4, 0.3, 0.1, 0.1)},
}
