"""Mutation testing by cosmic-ray, for scripts/mutate: which changes of the code no test notices.

cosmic-ray and not mutmut: it also changes decorated functions, class bodies and tables, of which
this code has many, and needs nothing of the layout but a copy.
"""

import argparse
import ast
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).parents[1]
COPY = Path(os.environ["HSMWRAP_MUTATED"])
SURVIVORS = ROOT / "scripts/mutation_survivors.toml"
WANTED = 0.97
"""The share of mutants that the tests have to notice."""
_CONFIG = """\
[cosmic-ray]
module-path = "{module}"
timeout = 120.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"
"""


def main() -> int:
    """Mutate each module; returns the exit status."""
    listed: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "hsmwrap"
    ]["mutate"]
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(listed))
    modules = parser.parse_args().modules or list(listed)
    unknown = [module for module in modules if module not in listed]
    if unknown:
        parser.error(f"pyproject.toml lists no tests for {unknown[0]}")
    return max(_judge(module, listed[module]) for module in modules)


def _judge(module: str, tests: str) -> int:
    survived, total = _mutate(module, tests)
    explained = Counter(
        {
            (entry["was"], entry["is"]): entry.get("times", 1)
            for entry in tomllib.loads(SURVIVORS.read_text()).get("survivor", [])
            if entry["module"] == module
        }
    )
    for (was, is_), times in (survived - explained).items():
        print(f"{module}: SURVIVED {times} times\n  - {was}\n  + {is_}")
    for (was, is_), times in (explained - survived).items():
        print(f"{module}: LISTED AND NOTICED {times} times\n  - {was}\n  + {is_}")
    share = 1 - survived.total() / max(total, 1)
    unexplained = (survived - explained).total()
    print(f"{module}: {total} mutants, {share:.1%} noticed, {unexplained} survived unexplained")
    return int(survived != explained or share < WANTED)


def _mutate(module: str, tests: str) -> tuple[Counter[tuple[str, str]], int]:
    """The survivors as changed lines, before and after; and how many mutants there were."""
    config, session = COPY / "cosmic-ray.toml", COPY / "session.sqlite"
    session.unlink(missing_ok=True)
    config.write_text(_CONFIG.format(module=module, python=sys.executable, tests=tests))
    environment = os.environ | {"PYTHONPATH": str(COPY)}

    def cosmic_ray(*arguments: object) -> None:
        command = [sys.executable, "-m", "cosmic_ray.cli", *map(str, arguments)]
        subprocess.run(command, cwd=COPY, env=environment, check=True)

    cosmic_ray("baseline", config)
    cosmic_ray("init", config, session)
    with use_db(str(session), WorkDB.Mode.open) as database:
        _skip_annotations(database, module)
    cosmic_ray("exec", config, session)
    with use_db(str(session), WorkDB.Mode.open) as database:
        results = [result for _, result in database.results]
    tried = [each for each in results if each.worker_outcome is not WorkerOutcome.SKIPPED]
    survivors = [each for each in tried if each.test_outcome is TestOutcome.SURVIVED]
    return Counter(_changed_line(each.diff) for each in survivors), len(tried)


def _skip_annotations(database: WorkDB, module: str) -> None:
    """Annotations are text here (``from __future__``): no change of one matters."""
    spans = list(_annotations((COPY / module).read_text()))
    for item in list(database.work_items):
        (mutation,) = item.mutations
        if any(start <= mutation.start_pos and mutation.end_pos <= end for start, end in spans):
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def _annotations(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if isinstance(found, ast.expr) and found.end_lineno and found.end_col_offset:
                end = (found.end_lineno, found.end_col_offset)
                yield (found.lineno, found.col_offset), end


def _changed_line(diff: str) -> tuple[str, str]:
    lines = diff.splitlines()
    was = [line[1:].strip() for line in lines if line.startswith("-") and line[:3] != "---"]
    is_ = [line[1:].strip() for line in lines if line.startswith("+") and line[:3] != "+++"]
    return " ".join(was), " ".join(is_)


if __name__ == "__main__":
    sys.exit(main())
