"""What some licences require from anyone who redistributes the model: a NOTICE file, a name prefix, the licence text.

Sources: section 1.b of the Llama Community Licences (2, 3, 3.1, 3.2, 3.3, 4); section 3.1 of the Gemma Terms of Use.
It is a reminder, not legal advice.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTICE = "NOTICE"


@dataclass(frozen=True)
class Licence:
    """A licence with conditions on redistribution.

    Attributes:
        title: its full name.
        notice_text: the required text of the file `NOTICE`.
        built_with: the words that must be displayed, such as "Built with Llama"; empty for none.
        name_prefix: the required start of the name of a derived model; empty for none.
    """

    title: str
    notice_text: str
    built_with: str = ""
    name_prefix: str = ""


def _llama(version: str) -> Licence:
    title = f"{version} Community License"
    notice_text = f"{version} is licensed under the {title}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return Licence(title, notice_text, "Built with Llama", "Llama")


# By `license` in the metadata of the model card, or by `license_name` if that is "other".
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
    """The licence in a model card's metadata, if it is one of `LICENCES`."""
    names = (metadata.get("license"), metadata.get("license_name"))
    return next((LICENCES[name] for name in names if isinstance(name, str) and name in LICENCES), None)


def licence_warnings(metadata: dict, file_names: list[str], repo_name: str | None = None) -> list[str]:
    """The conditions of the licence that an export does not meet, one line each.

    Args:
        metadata: the metadata of the model card.
        file_names: names of all files of the export.
        repo_name: name of the repository without its namespace; None if it is not known yet.
    """
    licence = licence_of(metadata)
    if licence is None:
        return []
    warnings = []
    prefix = licence.name_prefix.replace(" ", "-")
    if prefix and repo_name and not repo_name.lower().replace("_", "-").startswith(prefix.lower()):
        warnings.append(f"the {licence.title} requires a name that begins with {prefix!r}; {repo_name!r} does not")
    if not any(name.lower().startswith(("license", "licence")) for name in file_names):
        warnings.append(f"the {licence.title} requires a copy of its text; add it to the directory as LICENSE")
    return warnings
