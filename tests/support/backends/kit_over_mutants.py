"""The conformance kit over every mutant; collected by test_kit.py alone, for it fails."""

from support.backends.honest_kit import HonestKit
from support.backends.mutants import MUTANTS


def _kit(mutant):
    attributes = {"spoiled": mutant, "opens": mutant.backend, "custody": mutant.custody}
    if not mutant.counts:
        attributes["count_objects"] = HonestKit.cannot_count
    return type(f"Test{mutant.backend.__name__}", (HonestKit,), attributes)


globals().update({f"Test{mutant.backend.__name__}": _kit(mutant) for mutant in MUTANTS})
