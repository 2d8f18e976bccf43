"""An SDK imports an SM4 key by SM2PKE into HSMs whose vendors have both, and uses it, over HTTP."""

import base64
import secrets

import pytest
from support.faults.shim import fault_shim
from support.http.kms_over_http import running_kms
from support.http.material_clients import openssl_sm2
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS
from support.pkcs11.vendors import SIMULATED, SM_ONLY

from hsmwrap.backend import Exposure
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.registry import open_backend

pytestmark = SDK_WARNINGS


@pytest.mark.parametrize("simulated", [*SIMULATED, SM_ONLY], ids=["sansec", "tass", "sm-only"])
def test_an_sm4_key_by_sm2pke(simulated, softhsm, tmp_path):
    shim = fault_shim(softhsm.module, tmp_path / "shim")
    prefix = f"http-{simulated}-{simulated.restrictions.value:x}"
    settings = simulated.play(shim, tmp_path, softhsm, key_prefix=prefix)
    Pkcs11Backend.initialise_keys(settings)
    with (
        open_backend("pkcs11", settings) as backend,
        running_kms(tmp_path, backend) as server,
    ):
        pair = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)
        assert backend.capabilities().wrapping_for(*pair).exposure is Exposure.IN_HSM

        def call(action, **parameters):
            return SDKS[DEFAULT_SDKS[0]].call(server.credentials, action, **parameters)

        named = {"Origin": "EXTERNAL", "ProtectionLevel": "HSM", "KeySpec": "Aliyun_SM4"}
        key_id = call("CreateKey", **named)["KeyMetadata"]["KeyId"]
        issued = call(
            "GetParametersForImport",
            KeyId=key_id,
            WrappingKeySpec="EC_SM2",
            WrappingAlgorithm="SM2PKE",
        )
        encrypted = openssl_sm2(base64.b64decode(issued["PublicKey"]), secrets.token_bytes(16))
        call(
            "ImportKeyMaterial",
            KeyId=key_id,
            EncryptedKeyMaterial=base64.b64encode(encrypted).decode(),
            ImportToken=issued["ImportToken"],
            KeyMaterialExpireUnix=0,
        )
        plaintext = base64.b64encode(b"attack at dawn").decode()
        blob = call("Encrypt", KeyId=key_id, Plaintext=plaintext)["CiphertextBlob"]
        assert call("Decrypt", CiphertextBlob=blob)["Plaintext"] == plaintext
        data_key = call("GenerateDataKey", KeyId=key_id)
        opened = call("Decrypt", CiphertextBlob=data_key["CiphertextBlob"])
        assert opened["Plaintext"] == data_key["Plaintext"]
