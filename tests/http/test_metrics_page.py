"""/metrics of a KMS that was opened from a configuration: HTTP, backends, key-pair pool."""

import re
import time

import pytest
from werkzeug.test import Client

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.http.app import _render, create_app
from hsmwrap.kms import Caller, Permissions
from hsmwrap.kms.config import load_config
from hsmwrap.kms.opening import open_kms
from hsmwrap.metrics import PrometheusObserver
from hsmwrap.software import KeyringFile

CONFIGURATION = """
database_url = 'sqlite:///{directory}/kms.db'
access_key_file = '{directory}/access-keys.toml'
audit_file = '{directory}/audit.log'
key_pool = 2

[backends.SOFTWARE]
plugin = "software"

[backends.SOFTWARE.settings]
keyring_file = '{directory}/keyring'
"""


@pytest.fixture
def kms(tmp_path):
    KeyringFile(tmp_path / "keyring").create()
    access_keys = tmp_path / "access-keys.toml"
    access_keys.touch(mode=0o600)
    access_keys.write_text("[[access_key]]\nid = 'a'\nsecret = 'b'\nallow = []\n")
    path = tmp_path / "server.toml"
    path.write_text(CONFIGURATION.format(directory=tmp_path))
    with open_kms(load_config(path), observer=PrometheusObserver()) as kms:
        yield kms


def test_everything_is_on_one_page(kms):
    app = create_app(kms, kms.access_keys, kms.nonces, collect=lambda: _render(*kms.watched()))
    backends, (pool,) = kms.watched()
    pair = WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256
    pool.prepare(backends[0], [pair])
    with pool._changed:
        assert pool._changed.wait_for(lambda: pool.facts()[0].level == 2, 60)
    page = Client(app.metrics_app).get("/metrics").text
    labels = f'{{algorithm="{pair[1]}",backend="software",spec="{pair[0]}"}}'
    assert 'hsmwrap_backend_ready{backend="software"} 1.0' in page
    assert f"hsmwrap_keypool_level{labels} 2.0" in page
    assert 'operation="generate_wrapping_key",outcome="ok"' in page


def value(page, name):
    return float(re.search(rf"^{name} (\S+)", page, re.MULTILINE)[1])


def test_facts_of_the_kms(kms, tmp_path):
    page = _render(*kms.watched(), kms.gauges).decode()
    assert 'hsmwrap_keys{state="PendingImport"} 0.0' in page
    (key_set,) = re.findall(
        r'hsmwrap_key_set{backend="software",key_set="(\w+)",use="current"} 1', page
    )
    assert key_set
    assert value(page, "hsmwrap_processes_ready") == value(page, "hsmwrap_processes") == 1
    before = time.time()
    kms.execute("CreateKey", {"Origin": "EXTERNAL"}, Caller("a", Permissions.everything()), "r")
    kms.sweep()
    page = _render(*kms.watched(), kms.gauges).decode()
    assert 'hsmwrap_keys{state="PendingImport"} 1.0' in page
    swept = value(page, "hsmwrap_last_sweep_timestamp_seconds")
    assert before <= swept <= time.time()
    for name in ("sweep", "audit"):
        assert f"hsmwrap_{name}_failures_total 0.0" in page
    (tmp_path / "audit.log").unlink()
    (tmp_path / "audit.log").mkdir()
    kms.sweep()  # its part that anchors the log fails
    page = _render(*kms.watched(), kms.gauges).decode()
    assert "hsmwrap_sweep_failures_total 1.0" in page
    assert value(page, "hsmwrap_audit_failures_total") >= 1
    assert value(page, "hsmwrap_processes_ready") == 0
    assert value(page, "hsmwrap_processes") == 1


def test_closing_the_kms_closes_the_pool(kms):
    (pool,) = kms.watched()[1]
    kms.close()
    assert "closed" in repr(pool)
