"""SM2 public-key encryption (GB/T 32918.4): curve, ciphertext layouts, KDF, engines."""

from hsmwrap.sm2.curve import OID_DER, decode_point, encode_point, is_on_curve, recover_y
from hsmwrap.sm2.decrypt import decrypt_with_point, decrypt_with_x2
from hsmwrap.sm2.engine import Sm2Engine, Sm2KeyPair, open_engine
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS, Layout, Sm2Ciphertext, check_layouts, parse
from hsmwrap.sm2.kdf import sm2_kdf, sm3
from hsmwrap.sm2.spki import decode_spki, encode_spki

__all__ = [
    "DEFAULT_LAYOUTS",
    "OID_DER",
    "Layout",
    "Sm2Ciphertext",
    "Sm2Engine",
    "Sm2KeyPair",
    "check_layouts",
    "decode_point",
    "decode_spki",
    "decrypt_with_point",
    "decrypt_with_x2",
    "encode_point",
    "encode_spki",
    "is_on_curve",
    "open_engine",
    "parse",
    "recover_y",
    "sm2_kdf",
    "sm3",
]
