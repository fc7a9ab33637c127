"""Every tiny family belongs to one class of structure."""

from __future__ import annotations

from support.structure import CLASSES, REPRESENTATIVES
from support.tiny import FAMILIES


def test_classes_hold_every_family_once():
    families = [family for each in CLASSES.values() for family in each]
    assert sorted(families) == sorted(FAMILIES)
    assert len(REPRESENTATIVES) == len(CLASSES)
