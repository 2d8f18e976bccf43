"""Fuzz targets under atheris, one after the other: ``scripts/fuzz MINUTES [TARGET…]``.

Each target gets the same share of the time, in a process of its own. Inputs that reach new code
are kept in the output directory and offered to the next run; a finding is printed with its file
and makes the exit status 1. What is worth keeping goes into the corpus by hand.

The target ``kms_states`` is not of bytes but of calls: hypothesis's sequences of them, on two
processes of the reference KMS. A finding is the shortest sequence that fails.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from fuzzing.mutations import MOST_BYTES
from fuzzing.targets import TARGETS

KMS_STATES = "kms_states"
ALL = [*TARGETS, KMS_STATES]


def main() -> int:
    arguments = _arguments()
    names = arguments.targets or ALL
    share = max(1, int(arguments.minutes * 60 / len(names)))
    failed = [name for name in names if not _fuzz_in_child(name, share, arguments.output)]
    print(f"{len(names)} targets, {share} s each; findings in: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("minutes", type=float, help="for all targets together")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(ALL))
    parser.add_argument("--output", type=Path, default=Path("build/fuzz"), metavar="DIRECTORY")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in ALL]
    if unknown:
        parser.error(f"no target {unknown[0]}; there are {', '.join(ALL)}")
    return arguments


def _fuzz_in_child(name: str, seconds: int, output: Path) -> bool:
    print(f"{name}: {seconds} s", flush=True)
    if name == KMS_STATES:
        command = [sys.executable, "-m", "support.kms.stateful", str(seconds)]
        return subprocess.run(command, check=False).returncode == 0
    kept = output / name
    kept.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fuzzing.under_atheris", name, str(kept)]
    command += [str(TARGETS[name].corpus), f"-max_total_time={seconds}", "-print_final_stats=1"]
    command += [f"-max_len={MOST_BYTES}", "-timeout=10", f"-artifact_prefix={kept}/finding-"]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
