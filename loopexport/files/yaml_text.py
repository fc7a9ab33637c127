"""Read YAML from spec files and model cards without the surprises of YAML 1.1."""

from __future__ import annotations

import re

import yaml

from loopexport.errors import one_line

_ALL = yaml.SafeLoader.yaml_implicit_resolvers


def _resolvers(*kinds: str) -> dict:
    """SafeLoader's resolvers of these kinds; any other plain scalar stays text."""
    tags = {f"tag:yaml.org,2002:{kind}" for kind in kinds}
    return {first: [each for each in known if each[0] in tags] for first, known in _ALL.items()}


class CardLoader(yaml.SafeLoader):
    """Reads every scalar but null as text, so that the language `no` does not become false."""

    yaml_implicit_resolvers = _resolvers("null", "merge")


class SpecLoader(yaml.SafeLoader):
    """Reads decimal numbers only: 12:20 is a span, not the base-60 number 740, and 1e-3 is a number."""

    yaml_implicit_resolvers = _resolvers("null", "merge", "bool")

    def compose_mapping_node(self, anchor):
        """Compose a mapping; refuse a key that is there twice, of which PyYAML would take the last."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return node


class ResultsLoader(CardLoader):
    """Reads decimal numbers, true and false too, for the results in the metadata of a card."""


ResultsLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false)$"), None)

for _loader in (SpecLoader, ResultsLoader):
    _loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$", re.ASCII), None)
    _loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", re.ASCII),
        None,
    )


def load_yaml(text: str, loader: type[yaml.SafeLoader]):
    """Parse YAML text.

    Raises:
        ValueError: the text is not YAML; the message is one line.
    """
    try:
        return yaml.load(text, loader)
    # PyYAML does not catch errors of its own constructors, such as KeyError for `!!bool maybe`.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
