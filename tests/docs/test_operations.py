"""The commands of docs/operations.md do what is written there; what it names exists."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from support.documents import ROOT, section_of, text_of

OPERATIONS = ROOT / "docs" / "operations.md"
BLOCK = re.compile(r"^```console tested\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ON_TWO_TOKENS = re.compile(
    r"^```console tested on two tokens\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def commands(block):
    """Pairs of a command, with its continuation lines, and the output that is written under it."""
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


def agrees(written, printed):
    """Line by line; … stands for any text, and alone on a line for any number of lines."""
    if not written:
        return not printed
    if written[0] == "…":
        return any(agrees(written[1:], printed[skip:]) for skip in range(len(printed) + 1))
    pattern = written[0].replace("[", "[[]").replace("…", "*")
    return bool(printed) and fnmatchcase(printed[0], pattern) and agrees(written[1:], printed[1:])


# What happens before these commands.
MEANWHILE = {
    "hsmwrap keys rotate --config hsmwrap.toml\n": "imports",
    "hsmwrap keys retire 2 --config hsmwrap.toml\n": "two_days",
}
EACH = 'for each in "$@"; do bash "$each" >"$each.out" 2>"$each.err" || exit; done'


def test_console_blocks_do_what_they_say(softhsm, tmp_path):
    """One after the other, in one directory, on a token of their own."""
    written = [each for block in BLOCK.findall(text_of(OPERATIONS)) for each in commands(block)]
    assert written
    scripts = [tmp_path / f"command-{number}" for number in range(len(written))]
    assert MEANWHILE.keys() <= {command for command, _ in written}
    for script, (command, _) in zip(scripts, written, strict=True):
        before = MEANWHILE.get(command)
        happens = f"python -m support.meanwhile {before} hsmwrap.toml || exit\n" if before else ""
        script.write_text(happens + command)
    (tmp_path / "softhsm").symlink_to(ROOT / "softhsm")  # as in a clone
    environment = environment_of(tmp_path / "token")
    run = [ROOT / "softhsm" / "init-token", "bash", "-c", EACH, "each", *scripts]
    status = subprocess.run(run, cwd=tmp_path, env=environment, check=False).returncode
    errors = [error.read_text() for error in sorted(tmp_path.glob("command-*.err"))]
    assert status == 0, errors
    for script, (command, output) in zip(scripts, written, strict=True):
        printed = script.with_name(f"{script.name}.out").read_text()
        lines = [line.rstrip() for line in printed.splitlines()]
        assert agrees(output, lines), f"{command}{printed}"


def environment_of(token):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "HSMWRAP_TOKEN_DIR": str(token)}


def test_key_sets_are_cloned_as_it_is_written(softhsm, tmp_path):
    """On two tokens; a fingerprint that is given is the one that was shown last."""
    (block,) = ON_TWO_TOKENS.findall(text_of(OPERATIONS))
    in_source = "source$ hsmwrap keys init\n…\n"
    shown = ""
    for host, command, output in re.findall(
        r"^(source|target)\$ (.*)\n((?:(?!source\$|target\$).*\n)*)",
        in_source + block,
        re.MULTILINE,
    ):
        confirmed = re.sub(r"(--fingerprint) \w+…", rf"\1 {shown}", command)
        run = [ROOT / "softhsm" / "init-token", "bash", "-c", confirmed]
        environment = environment_of(tmp_path / host) | {"HSMWRAP_TOKEN_LABEL": host}
        done = subprocess.run(
            run, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = re.search("fingerprint ([0-9a-f]{64})", done.stdout)
        shown = found[1] if found else ""
        written = re.sub(r"fingerprint \w+…", "fingerprint …", output).splitlines()
        assert agrees(written, done.stdout.splitlines()), f"{command}\n{done.stdout}"


@pytest.mark.parametrize(
    ("written", "printed", "expected"),
    [
        ([], ["more"], False),
        (["a … c"], ["a b c"], True),
        (["a … c"], ["a b d"], False),
        (["…", "end"], ["any", "thing", "end"], True),
        (["…", "end"], ["any", "thing"], False),
        (["first"], ["first", "second"], False),
    ],
)
def test_output_is_compared(written, printed, expected):
    assert agrees(written, printed) is expected


def test_the_metrics_are_these():
    metrics = pytest.importorskip("hsmwrap.metrics", reason="capability: no prometheus_client")
    metrics.count_request("DescribeKey", "OK", 0.0)
    metrics.PrometheusObserver()
    page = metrics.render(metrics.FactsCollector([])).decode()
    there = set(re.findall(r"^# TYPE (hsmwrap_\w+) ", page, re.MULTILINE))
    table = section_of(OPERATIONS, "Metrics")
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(there - {name for name in there if name.endswith("_created")})


def test_every_log_message_is_there():
    source = "".join(text_of(path) for path in (ROOT / "hsmwrap").rglob("*.py"))
    messages = re.findall(r"^\|[^|]*\blog: `([^`]+)`", text_of(OPERATIONS), re.MULTILINE)
    assert messages
    assert [message for message in messages if f'"{message}"' not in source] == []
