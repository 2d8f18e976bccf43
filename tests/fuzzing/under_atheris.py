"""One target under atheris; the arguments after its name are libFuzzer's."""

import sys

import atheris

with atheris.instrument_imports(include=["hsmwrap"]):
    from fuzzing.targets import TARGETS

atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]].run)
atheris.Fuzz()
