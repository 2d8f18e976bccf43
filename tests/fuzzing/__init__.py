"""Fuzzing of everything that reads bytes from outside: clients, databases, files, the environment.

``targets`` says what is fuzzed and which outcomes are right; ``corpus/TARGET/`` keeps inputs worth
keeping, one a file; ``mutations`` changes them for the short run in the tests. ``scripts/fuzz``
runs the same targets under atheris, guided by coverage, for as long as wanted.
"""
