"""The commands of docs/operations.md do what is written there; what it names exists."""

import re
import subprocess

import pytest
from support import console
from support.documents import ROOT, section_of, text_of

OPERATIONS = ROOT / "docs" / "operations.md"
ON_TWO_TOKENS = re.compile(
    r"^```console tested on two tokens\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


# What happens before these commands.
MEANWHILE = {
    "hsmwrap keys rotate --config hsmwrap.toml\n": "imports",
    "hsmwrap keys retire 2 --config hsmwrap.toml\n": "two_days",
}


def test_console_blocks_do_what_they_say(softhsm, tmp_path):
    """One after the other, in one directory, on a token of their own."""
    written = console.commands_of(OPERATIONS)
    assert MEANWHILE.keys() <= {command for command, _ in written}

    def before(command):
        happens = MEANWHILE.get(command)
        return f"python -m support.meanwhile {happens} hsmwrap.toml || exit\n" if happens else ""

    console.run(written, tmp_path, before)


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
        environment = console.environment_of(tmp_path / host) | {"HSMWRAP_TOKEN_LABEL": host}
        done = subprocess.run(
            run, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = re.search("fingerprint ([0-9a-f]{64})", done.stdout)
        shown = found[1] if found else ""
        written = re.sub(r"fingerprint \w+…", "fingerprint …", output).splitlines()
        assert console.agrees(written, done.stdout.splitlines()), f"{command}\n{done.stdout}"


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
    assert console.agrees(written, printed) is expected


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
