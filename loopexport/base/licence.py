"""What the licences of some bases demand of whoever distributes the model on: a notice, a name, a copy of their text.

Sources: section 1.b of the Llama Community Licences (2, 3, 3.1, 3.2, 3.3, 4); section 3.1 of the Gemma Terms of Use.
This is help with what is easily forgotten, not legal advice.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTICE = "NOTICE"


@dataclass(frozen=True)
class Licence:
    """A licence that demands something.

    Attributes:
        title: what it is called.
        notice: the text that a file named `NOTICE` has to hold.
        built_with: what has to be displayed, such as "Built with Llama"; may be empty.
        name_prefix: what the name of a model that was made from it has to begin with; may be empty.
    """

    title: str
    notice: str
    built_with: str = ""
    name_prefix: str = ""


def _llama(version: str) -> Licence:
    title = f"{version} Community License"
    notice = f"{version} is licensed under the {title}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return Licence(title, notice, "Built with Llama", "Llama")


# By the Hub's `license`, or `license_name` where that is "other".
LICENCES = {
    "llama2": Licence(
        "LLAMA 2 Community License",
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3": Licence(
        "Meta Llama 3 Community License",
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        "Built with Meta Llama 3",
        "Llama 3",
    ),
    "llama3.1": _llama("Llama 3.1"),
    "llama3.2": _llama("Llama 3.2"),
    "llama3.3": _llama("Llama 3.3"),
    "llama4": _llama("Llama 4"),
    "gemma": Licence(
        "Gemma Terms of Use",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}


def licence_of(metadata: dict) -> Licence | None:
    """The licence in a model card's metadata, if it is one that demands something."""
    names = (metadata.get("license"), metadata.get("license_name"))
    return next((LICENCES[name] for name in names if isinstance(name, str) and name in LICENCES), None)


def licence_warnings(metadata: dict, file_names: list[str], repo_name: str | None = None) -> list[str]:
    """What the licence demands and an export with these files, published under this name, does not fulfil.

    Args:
        metadata: of the model card.
        file_names: of all files that are published.
        repo_name: name of the repository, without its namespace; None where it is not known yet.
    """
    licence = licence_of(metadata)
    if licence is None:
        return []
    warnings = []
    prefix = licence.name_prefix.replace(" ", "-")
    if prefix and repo_name and not repo_name.lower().replace("_", "-").startswith(prefix.lower()):
        warnings.append(f"the {licence.title} wants the model's name to begin with {prefix!r}; {repo_name!r} does not")
    if not any(name.lower().startswith(("license", "licence")) for name in file_names):
        warnings.append(f"the {licence.title} wants a copy of its text to go along; add it to the directory as LICENSE")
    return warnings
