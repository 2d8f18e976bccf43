"""The memory backend with a script: notes what it is asked, fails and answers as it is told."""

import functools
from collections import defaultdict
from dataclasses import replace

from hsmwrap.backend import Custody
from hsmwrap.composition import Composition
from hsmwrap.testing.memory import MemoryBackend, MemorySettings

INTERNAL = Custody.HSM_INTERNAL


@functools.cache
def _pair(algorithm):
    return MemoryBackend().schemes[algorithm].generate()


class OnePair(MemoryBackend):
    """Has one key pair for each algorithm: generating takes no time."""

    def make_pair(self, algorithm):
        return _pair(algorithm)


class Scripted(Composition):
    """Passes on to a memory backend whose keys are objects.

    ``calls`` has the names of the calls, but for ``capabilities``. ``failing`` maps names to what
    is raised instead, ``changing`` names to what is done with the answer.
    """

    opens = OnePair

    def __init__(self, **settings):
        custodies = {"wrapping_custody": INTERNAL, "material_custody": INTERNAL}
        super().__init__(self.opens(MemorySettings.from_mapping(custodies | settings)))
        self.calls = []
        self.failing = {}
        self.changing = defaultdict(lambda: _unchanged)

    @property
    def store(self):
        return self._backend.store

    def _forward(self, asked, declared, *arguments, **named):
        name = declared.__name__
        if name != "capabilities":
            self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]
        return self.changing[name](super()._forward(asked, declared, *arguments, **named))


def _unchanged(answer):
    return answer


def changed(**differs):
    """A change of an answer's fields; an imported key's, too, those of its reference."""

    def change(answer):
        own = {name: value for name, value in differs.items() if hasattr(answer, name)}
        if rest := differs.keys() - own:
            own["key"] = replace(answer.key, **{name: differs[name] for name in rest})
        return replace(answer, **own)

    return change
