"""Mutation testing with the operators of cosmic-ray, for scripts/mutate.

cosmic-ray makes the mutants. It would start an interpreter for each of them; here each runs in a
fork of a process that has imported all but hsmwrap and its tests, which is several times faster.
"""

import argparse
import ast
import importlib
import os
import pickle
import random
import re
import shlex
import signal
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import cache_from_source
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
COPY = Path(os.environ["HSMWRAP_MUTATED"])
SURVIVORS = ROOT / "scripts/mutation_survivors.toml"
WANTED = 0.97
"""The share of mutants that the tests have to notice."""


class Change(NamedTuple):
    """What a mutant changes: in a class or function ("" is the module), lines before and after."""

    where: str
    was: str
    becomes: str

    def __str__(self) -> str:
        return f"  in {self.where or 'the module'}\n  - {self.was}\n  + {self.becomes}"


@dataclass(frozen=True)
class Mutant:
    """A changed module."""

    change: Change
    source: str


def main() -> int:
    """Mutate each module; returns the exit status."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hsmwrap"]["mutate"]
    listed: dict[str, str] = settings["modules"]
    parser = argparse.ArgumentParser(prog="scripts/mutate")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(listed))
    parser.add_argument("--sample", type=int, help="try that many mutants of each module")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the mutants, try none")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - listed.keys():
        parser.error(f"pyproject.toml lists no tests for {unknown.pop()}")
    explained = tomllib.loads(SURVIVORS.read_text()).get("survivor", [])
    status = 0
    for module in arguments.modules or listed:
        places = _places(COPY / module, settings["operators"])
        if arguments.sample is not None:
            # Not for a secret: the same seed makes the same sample.
            random.Random(arguments.seed).shuffle(places)  # noqa: S311
        mutants = list(islice(_mutants(COPY / module, places), arguments.sample))
        if arguments.list:
            print(f"{module}: {len(mutants)} mutants", *(m.change for m in mutants), sep="\n")
            continue
        known = Counter(
            {
                Change(entry["in"], entry["was"], entry["is"]): entry.get("times", 1)
                for entry in explained
                if entry["module"] == module
            }
        )
        print(f"{module}: {len(mutants)} mutants", flush=True)
        status |= _judge(module, mutants, shlex.split(listed[module]), known)
    return status


def _judge(module: str, mutants: list[Mutant], tests: list[str], known: Counter[Change]) -> int:
    start = time.monotonic()
    survived = Counter(_survivors(COPY / module, mutants, tests))
    tried = Counter(mutant.change for mutant in mutants)
    unexplained, noticed = survived - known, (known & tried) - survived
    for change, times in noticed.items():
        print(f"{module}: LISTED AND NOTICED {times} times\n{change}")
    share = 1 - survived.total() / max(len(mutants), 1)
    real = 1 - unexplained.total() / max(len(mutants) - (survived & known).total(), 1)
    print(
        f"{module}: {len(mutants)} mutants, {share:.1%} noticed, {survived.total()} survived, "
        f"{unexplained.total()} of them unexplained ({real:.1%} noticed without the explained); "
        f"{(time.monotonic() - start) / 60:.1f} minutes",
        flush=True,
    )
    return int(bool(unexplained or noticed) or real < WANTED)


# --- the mutants --------------------------------------------------------------------------------


def _places(module: Path, wanted: list[str]) -> list[tuple[Operator, int, str]]:
    """Each place that an operator can change: the operator, the number of the place, and where."""
    tree = get_ast(module.read_text())
    names = [n for n in operator_names() if re.fullmatch("|".join(wanted), n.removeprefix("core/"))]
    operators = [get_operator(name)() for name in names]
    return [
        (operator, occurrence, _where(node))
        for operator in operators
        for occurrence, node in enumerate(
            node for node in ast_nodes(tree) for _ in operator.mutation_positions(node)
        )
    ]


def _mutants(module: Path, places: list[tuple[Operator, int, str]]) -> Iterator[Mutant]:
    source = module.read_text()
    meaning = _meaning(source)
    for operator, occurrence, where in places:
        # AttributeError: cosmic-ray cannot replace a dotted name in a tuple of exceptions.
        with suppress(SyntaxError, AttributeError):
            mutated = mutate_code(source, operator, occurrence)
            if _meaning(mutated) != meaning:
                yield Mutant(Change(where, *_changed_lines(source, mutated)), mutated)


def _where(node: object) -> str:
    names = []
    while node is not None:
        if getattr(node, "type", "") in {"funcdef", "classdef"}:
            names.append(node.name.value)  # type: ignore[attr-defined]
        node = getattr(node, "parent", None)
    return ".".join(reversed(names))


def _changed_lines(source: str, mutated: str) -> tuple[str, str]:
    """The lines that differ; an operator changes neighbouring ones at most."""
    was, becomes = source.splitlines(), mutated.splitlines()
    while was and becomes and was[0] == becomes[0]:
        del was[0], becomes[0]
    while was and becomes and was[-1] == becomes[-1]:
        del was[-1], becomes[-1]
    return " ".join(" ".join(was).split()), " ".join(" ".join(becomes).split())


def _meaning(source: str) -> str:
    """The program without what a mutant cannot change the behaviour by.

    Annotations are texts here (``from __future__``), and protocols are for the type checker. The
    arguments frozen, slots and eq of dataclasses say what the code must not do, and it does not.
    """
    return ast.dump(_Meaning().visit(ast.parse(source)))


class _Meaning(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant("")
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if "Protocol" in map(ast.unparse, node.bases):
            node.body.clear()
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "dataclass":
                decorator.keywords.clear()
        return self.generic_visit(node)


# --- their tests --------------------------------------------------------------------------------


def _survivors(module: Path, mutants: list[Mutant], tests: list[str]) -> Iterator[Change]:
    os.chdir(COPY)
    sys.dont_write_bytecode = False
    original = module.read_text()
    start = time.monotonic()
    # The second time as each mutant is tried: tests that always fail would notice every mutant.
    if not (_passes(tests, timeout=1800, learn=True) and _passes(tests, timeout=1800)):
        sys.exit(f"the tests fail without a mutant: {shlex.join(tests)}")
    timeout = 10 + 2 * (time.monotonic() - start)
    # Only the first runs write byte code: that of a mutant could be taken for the next one's.
    sys.dont_write_bytecode = True
    Path(cache_from_source(module)).unlink(missing_ok=True)
    for mutant in mutants:
        module.write_text(mutant.source)
        if _passes(tests, timeout):
            print(f"SURVIVED\n{mutant.change}", flush=True)
            yield mutant.change
    module.write_text(original)


def _passes(tests: list[str], timeout: float, *, learn: bool = False) -> bool:
    """Whether the tests pass in a child; one that takes too long is ended with its children."""
    learned = COPY / "modules.pickle"
    child = os.fork()
    if not child:
        _run(tests, learned if learn else None)
    deadline = time.monotonic() + timeout
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = ended if ended != (0, 0) else os.waitpid(child, 0)
    if learn and status == 0:
        for name in pickle.loads(learned.read_bytes()):  # noqa: S301  # written above
            with suppress(Exception):
                importlib.import_module(name)
    return status == 0


def _run(tests: list[str], learned: Path | None) -> None:
    os.setsid()
    log = os.open(COPY / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 99
    try:
        # The plug-ins of pytest are imported already, which is warned of.
        ignored = "ignore::pytest.PytestAssertRewriteWarning"
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", ignored, *tests])
        if learned:
            mine = str(COPY)
            files = {n: getattr(m, "__file__", None) for n, m in list(sys.modules.items())}
            learned.write_bytes(
                pickle.dumps([n for n, f in files.items() if f and not f.startswith(mine)])
            )
    except BaseException:  # noqa: BLE001  # the parent goes on
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
