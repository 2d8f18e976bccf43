"""Imports by SM2PKE in a process of its own, whose memory is searched.

Usage: python -m support.pkcs11.sm2_importer SETTINGS_JSON

Prints the exposure and the public key (hex), takes one ciphertext (hex) a line, imports it and
destroys the key, and prints ``ok``. At the end of its input it ends.
"""

import json
import sys
from datetime import UTC, datetime, timedelta

from hsmwrap import registry
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec

SPEC, ALGORITHM = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE


def main():
    with registry.open_backend("pkcs11", json.loads(sys.argv[1])) as backend:
        exposure = backend.capabilities().wrapping_for(SPEC, ALGORITHM).exposure
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        key = backend.generate_wrapping_key(SPEC, ALGORITHM, expires_at=tomorrow)
        print(exposure, key.public_key.hex(), flush=True)
        for line in sys.stdin:
            imported = backend.unwrap_material(
                key.private_key,
                ALGORITHM,
                bytes.fromhex(line),
                key_spec=KeySpec.ALIYUN_AES_256,
            )
            backend.destroy_key(imported.key)
            print("ok", flush=True)
        backend.discard_wrapping_key(key.private_key)


if __name__ == "__main__":
    main()
