"""The schema: `hsmwrap db`, a serving user without rights to change it, newer and older ones."""

import json
import subprocess
import sys
from contextlib import closing

import psycopg
import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text
from support.kms.fakes import Client

from hsmwrap.cli import main
from hsmwrap.errors import ConfigurationError
from hsmwrap.kms import load_config, open_kms
from hsmwrap.kms.database import Database
from hsmwrap.kms.migrations import config
from hsmwrap.kms.revisions import REVISIONS
from hsmwrap.software import KeyringFile


@pytest.fixture
def server_file(tmp_path):
    """Writes a server's file for the database of a URL."""
    KeyringFile(tmp_path / "keyring").create()
    access = tmp_path / "access.toml"
    allow = '[{ actions = ["*"], keys = ["*"] }]'
    access.write_text(f'[[access_key]]\nid = "me"\nsecret = "x"\nallow = {allow}\n')
    access.chmod(0o400)

    def write(url):
        file = tmp_path / "server.toml"
        file.write_text(
            f'database_url = "{url}"\naccess_key_file = "{access}"\nstartup_wait = 0\n'
            f'audit_file = "{tmp_path}/audit.log"\nsweep_interval = 0\nmetrics_address = ""\n'
            f'[backends.SOFTWARE]\nplugin = "software"\n'
            f'settings = {{ keyring_file = "{tmp_path}/keyring" }}\n'
        )
        return file

    return write


def test_the_revisions_are_those_of_the_migrations():
    scripts = ScriptDirectory.from_config(config())
    assert tuple(each.revision for each in scripts.walk_revisions())[::-1] == REVISIONS


def test_alembic_is_loaded_only_to_migrate(empty_database_url):
    code = (
        "import sys; from hsmwrap.kms.database import Database; import hsmwrap.kms.opening;"
        f"Database({empty_database_url!r}).prepare(); print('alembic' in sys.modules)"
    )
    loaded = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [each.stdout.split() for each in loaded] == [["True"], ["False"]]


def said(capsys, action, file, *, status=0):
    assert main(["db", action, "--json", "--config", str(file)]) == status
    return json.loads(capsys.readouterr().out)


def test_upgrade_current_check(empty_database_url, server_file, capsys, tmp_path):
    file = server_file(empty_database_url)
    before = {"revision": None, "newest": "0001", "before": None, "current": False, "faults": []}
    assert said(capsys, "current", file) == before
    missing = said(capsys, "check", file, status=1)
    assert missing["faults"] == ["the database has no schema yet; this hsmwrap needs 0001"]
    assert not list(tmp_path.glob("kms.db*"))
    made = said(capsys, "upgrade", file)
    assert (made["revision"], made["before"], made["current"]) == ("0001", None, True)
    assert said(capsys, "check", file)["faults"] == []
    assert main(["db", "upgrade", "--config", str(file)]) == 0
    assert capsys.readouterr().out == "schema 0001, as this hsmwrap needs it\n"


def change(url, *statements):
    database = Database(url)
    with closing(database), database.write() as transaction:
        for statement in statements:
            transaction.execute(text(statement))


def test_check_finds_tables_that_differ(database_url, server_file, capsys):
    change(
        database_url, "ALTER TABLE used_once ADD COLUMN more INTEGER", "DROP TABLE failed_imports"
    )
    faults = said(capsys, "check", server_file(database_url), status=1)["faults"]
    assert {"the tables differ: add_table", "the tables differ: remove_column"} <= set(faults)
    assert main(["config", "check", "--open", "--config", str(server_file(database_url))]) == 1
    assert "the tables differ: add_table" in capsys.readouterr().out


def test_a_newer_schema(database_url, server_file, capsys):
    """A process that runs goes on and says so; none is started, and the schema stays."""
    file = server_file(database_url)
    with open_kms(load_config(file)) as kms:
        client = Client(kms, kms.access_keys.lookup("me").caller())
        change(database_url, "UPDATE alembic_version SET version_num = '0009'")
        health = kms.health()
        newer = "the database has schema 0009, which is newer than this hsmwrap's 0001"
        assert (health.ready, health.facts["database"]) == (
            True,
            f"ready, but {newer}: update this process",
        )
        client.create(ProtectionLevel="SOFTWARE")
    with pytest.raises(ConfigurationError, match=f"{newer}: update this hsmwrap"):
        open_kms(load_config(file))
    for action in ("upgrade", "check"):
        assert main(["db", action, "--config", str(file)]) == {"upgrade": 2, "check": 1}[action]
        captured = capsys.readouterr()
        assert newer in captured.out + captured.err


def test_a_running_process_logs_a_newer_schema(open_kms, database_url, caplog):
    kms = open_kms()
    change(database_url, "UPDATE alembic_version SET version_num = '0009'")
    kms.sweep()
    failed = [r for r in caplog.records if r.getMessage() == "a part of the sweep failed"]
    assert [r.why for r in failed if "schema 0009, which is newer" in r.why]


def test_an_older_schema_is_not_ready(open_kms, database_url):
    kms = open_kms()
    change(database_url, "DELETE FROM alembic_version")
    health = kms.health()
    assert not health.ready
    assert health.facts["database"] == "the database has no schema yet; this hsmwrap needs 0001"


# As in docs/operations.md.
ROLES = """
CREATE ROLE {role} LOGIN;
ALTER DEFAULT PRIVILEGES GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role};
"""


@pytest.fixture
def without_ddl(postgres_cluster):
    """URLs of a database: its owner's, and that of a user who may not change the schema."""
    owner = postgres_cluster.new_database()
    role = f"kms_{Database(owner).engine.url.database}"
    with psycopg.connect(owner.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(ROLES.format(role=role))
    return owner, owner.replace("hsmwrap@", f"{role}@")


def test_a_serving_user_without_rights_to_change_the_schema(
    without_ddl, server_file, monkeypatch, capsys
):
    owner, serving = without_ddl
    file = server_file(serving)
    with pytest.raises(ConfigurationError, match=r"run `hsmwrap db upgrade` as the owner .*42501"):
        open_kms(load_config(file))
    monkeypatch.setenv("HSMWRAP_SERVER_DATABASE_URL", owner)
    assert said(capsys, "upgrade", file)["current"]
    monkeypatch.delenv("HSMWRAP_SERVER_DATABASE_URL")
    assert said(capsys, "check", file)["faults"] == []
    with open_kms(load_config(file)) as kms:
        assert kms.health().ready
        client = Client(kms, kms.access_keys.lookup("me").caller())
        key_id = client.create(ProtectionLevel="SOFTWARE")
        client.import_material(key_id)
        client.usable(key_id)
        client("DeleteKeyMaterial", KeyId=key_id)
        kms.sweep()


def test_check_names_missing_rights(without_ddl, server_file, capsys):
    owner, serving = without_ddl
    database = Database(owner)
    with closing(database):
        database.migrate()
    role = serving.split("//")[1].split("@")[0]
    change(owner, f"REVOKE DELETE ON keys FROM {role}")
    file = server_file(serving)
    assert said(capsys, "check", file, status=1)["faults"] == ["this user may not DELETE in keys"]
