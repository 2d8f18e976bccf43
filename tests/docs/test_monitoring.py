"""Alarms and dashboard in docs/deploy: they ask for metrics and labels that exist."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from support.documents import ROOT, section_of, text_of

from hsmwrap.errors import HsmwrapError

DEPLOY = ROOT / "docs" / "deploy"
ALERTS = DEPLOY / "prometheus-alerts.yml"
RULES = [rule for group in yaml.safe_load(text_of(ALERTS))["groups"] for rule in group["rules"]]
DASHBOARD = json.loads(text_of(DEPLOY / "grafana-dashboard.json"))
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [*(rule["expr"] for rule in RULES), *(target["expr"] for target in TARGETS)]
ADDED_BY_PROMETHEUS = {"instance", "le"}


@pytest.fixture(scope="module")
def labels():
    """The labels of each metric, from a page that has a sample of each."""
    metrics = pytest.importorskip("hsmwrap.metrics", reason="capability: no prometheus_client")
    found = {}
    page = [*metrics.REGISTRY.collect(), *metrics.FactsCollector([]).collect()]
    for family in page:
        found[family.name] = set(getattr(family, "_labelnames", ()))
    for counted in (*metrics._requests(), *vars_of(metrics._instruments(metrics.REGISTRY))):
        found[counted._name] = set(counted._labelnames)
    return found


def vars_of(instruments):
    return instruments.operations, instruments.seconds


def named_in(expression):
    return re.findall(r"\bhsmwrap_\w+", expression)


def base(name):
    return re.sub(r"_(total|bucket|sum|count)$", "", name)


def labels_of(text):
    """The labels that an expression selects or groups by, and those in a text for people."""
    groups = re.findall(r"\bby \(([^)]*)\)", text)
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", text)
    written = re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text)
    return {name.strip() for group in groups for name in group.split(",")} | {*selected, *written}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_metric_exists(labels, expression):
    names = named_in(expression)
    assert names or expression == 'up{job="hsmwrap"} == 0'
    assert [name for name in names if base(name) not in labels] == []


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        *((rule["expr"], rule["annotations"]["summary"]) for rule in RULES[1:]),
        *((target["expr"], target["legendFormat"]) for target in TARGETS),
    ],
)
def test_each_label_exists(labels, expression, text):
    known = ADDED_BY_PROMETHEUS.union(*(labels[base(name)] for name in named_in(expression)))
    assert (labels_of(expression) | labels_of(text)) - known == set()


def test_each_code_exists():
    codes, waiting = set(), [HsmwrapError]
    import hsmwrap.http.errors
    import hsmwrap.kms.errors  # noqa: F401

    while waiting:
        error = waiting.pop()
        codes.add(error.code)
        waiting += error.__subclasses__()
    codes.add("OK")
    patterns = [
        code for text in EXPRESSIONS for code in re.findall(r'code(?:=~|!=|=)"([^"]+)"', text)
    ]
    assert patterns
    for each in "|".join(patterns).split("|"):
        assert any(re.fullmatch(each, code) for code in codes), each


def test_each_alarm_of_a_metric_has_a_rule():
    """What docs/operations.md says to watch by metric is in the file."""
    alarms = section_of(ROOT / "docs" / "operations.md", "Alarms")
    watched = set(re.findall(r"^\| `(hsmwrap_\w+)`", alarms, re.MULTILINE))
    assert watched
    assert watched <= {name for rule in RULES for name in named_in(rule["expr"])}


def test_names_of_rules_and_panels_are_their_own():
    for names in ([rule["alert"] for rule in RULES], [p["title"] for p in DASHBOARD["panels"]]):
        assert len(set(names)) == len(names)


def test_prometheus_takes_the_rules():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("capability: promtool is not installed (Debian: prometheus)")
    command = [promtool, "check", "rules", ALERTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
