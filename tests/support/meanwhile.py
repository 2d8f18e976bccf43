"""What happens to a KMS between the commands of docs/operations.md: clients import, time passes.

Usage: python -m support.meanwhile imports|two_days SERVER_FILE
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import update

from hsmwrap.kms import StaticAccessKeys, load_config, open_kms
from hsmwrap.kms.schema import KeySetSeen
from support import rsa_pairs
from support.kms.fakes import Client


def imports(kms):
    """Two keys are imported, and one is made."""
    client = Client(kms)
    for _ in range(2):
        client.import_material(client.create())
    client("CreateKey", ProtectionLevel="HSM")


def two_days(kms):
    """They pass for the database: the rotation, which this KMS has seen, was before them."""
    ago, superseded = datetime.now(UTC) - timedelta(days=2), KeySetSeen.superseded_at
    with kms._database.write() as transaction:
        transaction.execute(
            update(KeySetSeen).where(superseded.is_not(None)).values({superseded: ago})
        )


if __name__ == "__main__":
    rsa_pairs.use(preload=False)
    opened = load_config(Path(sys.argv[2]))
    with open_kms(opened, access_keys=StaticAccessKeys(())) as there:
        {"imports": imports, "two_days": two_days}[sys.argv[1]](there)
