"""The conformance kit over every mutant; collected by test_kit.py alone, for it fails."""

from support.backends.honest_kit import BareKit, HonestKit
from support.backends.mutants import MUTANTS


def _kit(mutant, base):
    attributes = {"spoiled": mutant, "plugin": mutant.backend, "custody": mutant.custody}
    if not mutant.counts:
        attributes["count_objects"] = HonestKit.cannot_count
    name = f"Test{base.__name__}{mutant.backend.__name__}"
    return type(name, (base,), attributes)


for _mutant in MUTANTS:
    for _base in (HonestKit, BareKit) if _mutant.repaired else (HonestKit,):
        _made = _kit(_mutant, _base)
        globals()[_made.__name__] = _made
del _mutant, _base, _made
