"""The code files that earlier versions wrote into exports, with their sha256.

An export keeps the code that it was made with, and that code stays valid. Whenever the templates change after a
release, add the released set here; `tests/data/README.md` says how.
"""

from __future__ import annotations

# The oldest set first.
EARLIER_SETS: tuple[dict[str, str], ...] = (
    {
        "configuration_looped.py": "b521683be2b846de60527ca56b2f3228f6aa5fb9a55e51ce2dafe098f28cf6ff",
        "modeling_looped.py": "7d9ec7e9f445930d0e82f3d3bec0152290f26f9da49471f0c626cb7e133e671c",
    },
    {
        "configuration_looped.py": "03a80daffa8b63f060f76512b3784a2a2e68d2095b03f44c401ee29ad32d2b02",
        "looped_cache.py": "2169f55beaab57a26f43fc7d943456de90f918eaf2112bf1dd3bdf60aab21a80",
        "looped_routing.py": "681b9d15c14f3cb98987b4cf2f2341c272fc723f89c27c894786cd592bba4bb5",
        "looped_rules.py": "c993b5235b0e39a4bc807f9b1cbdcdf23ee0f6b8e8cba720bb7b23dd263df5f4",
        "looped_spec.py": "ce3ec43cb2b68ac747a5fa59e3e98451cac3d0e50d99ca464db6b5ce9d400930",
        "looped_vllm.py": "b17dd6f4ebf57c4c184a8c811f7ab18e6e2ad34226fe3bedbfbf8eb6590fb77a",
        "looped_vllm_limits.py": "4cea72ba65c2947e9dcae6469d9e39520b3436c81007a4e4c00ec1322f39e1bd",
        "looped_walk.py": "f43bf621751c37c3973f598f4a852c7edd46765b9f2d3cdb882118d2d2aab2b8",
        "modeling_looped.py": "c41d72c5ad7ec0c809e902790a8a9247ec4251c9f1b595d8d46ab335efec0262",
    },
)
