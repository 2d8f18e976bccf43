"""Commands in documents, in blocks ``console tested``: run, and compared with what is written."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from support.documents import ROOT, text_of

_BLOCK = re.compile(r"^```console tested\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EACH = 'for each in "$@"; do bash "$each" >"$each.out" 2>"$each.err" || exit; done'


def commands_of(path):
    """Of all blocks of a document: pairs of a command and the output that is written under it."""
    return [each for block in _BLOCK.findall(text_of(path)) for each in _commands(block)]


def _commands(block):
    found = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:] + "\n", []))
        elif line.startswith(">"):
            command, output = found.pop()
            found.append((command + line[1:].removeprefix(" ") + "\n", output))
        else:
            found[-1][1].append(line)
    return found


def run(written, directory, before=lambda _command: ""):
    """Run the commands one after the other on a token of their own, and compare their output.

    Args:
        written: What :func:`commands_of` found.
        directory: Where they run.
        before: From a command to shell code that is to run before it.
    """
    scripts = [directory / f"command-{number:03}" for number in range(len(written))]
    for script, (command, _) in zip(scripts, written, strict=True):
        script.write_text(before(command) + command)
    (directory / "softhsm").symlink_to(ROOT / "softhsm")  # as in a clone
    environment = environment_of(directory / "token")
    arguments = [ROOT / "softhsm" / "init-token", "bash", "-c", _EACH, "each", *scripts]
    status = subprocess.run(arguments, cwd=directory, env=environment, check=False).returncode
    errors = [error.read_text() for error in sorted(directory.glob("command-*.err"))]
    assert status == 0, errors
    for script, (command, output) in zip(scripts, written, strict=True):
        printed = script.with_name(f"{script.name}.out").read_text()
        lines = [line.rstrip() for line in printed.splitlines()]
        assert agrees(output, lines), f"{command}{printed}"


def agrees(written, printed):
    """Line by line; … stands for any text, and alone on a line for any number of lines."""
    if not written:
        return not printed
    if written[0] == "…":
        return any(agrees(written[1:], printed[skip:]) for skip in range(len(printed) + 1))
    pattern = written[0].replace("[", "[[]").replace("…", "*")
    return bool(printed) and fnmatchcase(printed[0], pattern) and agrees(written[1:], printed[1:])


def environment_of(token):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "HSMWRAP_TOKEN_DIR": str(token)}
