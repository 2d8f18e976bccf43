"""``hsmwrap wrap``: what the customer does between GetParametersForImport and ImportKeyMaterial.

Offline: no HSM, no network, no database, and the core dependencies only.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path

from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.cli.arguments import Subparsers
from hsmwrap.coredumps import forbid_core_dumps
from hsmwrap.customer import (
    AnsweredParameters,
    encrypt_key_material,
    read_parameters,
    require_key_material,
)
from hsmwrap.errors import ConfigurationError, InvalidParameter
from hsmwrap.privatefile import MAX_BYTES, PrivateFile

_DESCRIPTION = """\
Encrypt key material under the parameters that GetParametersForImport answered, for
ImportKeyMaterial. It needs no HSM and no network, and runs on a machine without either.

The parameters are JSON as the API answers them, or what an SDK prints. They do not say which
algorithm was asked for: give the same one here.

Keep the key material. The KMS never gives it back, and takes the same material only when it has to
be imported again, so without it everything that was encrypted under the key is lost once the key
material expires or is deleted. --generate therefore always keeps what it draws, in a new file of
mode 0600, which is on the disk before the ciphertext is given out.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "wrap",
        help="encrypt key material for an import, as the customer, offline",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parameters",
        default="-",
        metavar="FILE",
        help="what GetParametersForImport answered (default: standard input)",
    )
    parser.add_argument(
        "--algorithm",
        required=True,
        choices=[algorithm.value for algorithm in WrappingAlgorithm],
        type=str.upper,
        help="the WrappingAlgorithm that GetParametersForImport was asked for",
    )
    parser.add_argument(
        "--key-spec",
        default=KeySpec.ALIYUN_AES_256,
        choices=[spec.value for spec in KeySpec],
        help="the KeySpec of the CMK: 32 bytes (default: %(default)s) or 16",
    )
    material = parser.add_mutually_exclusive_group(required=True)
    material.add_argument(
        "--key-material",
        metavar="FILE",
        help="file with the raw bytes, closed to other users (mode 0400 or 0600)",
    )
    material.add_argument(
        "--generate",
        metavar="FILE",
        help="draw key material and keep it in this file, which must not exist",
    )
    parser.add_argument(
        "--format",
        default="base64",
        choices=["base64", "raw", "request"],
        help="base64 for EncryptedKeyMaterial, in one line (default); raw bytes; or as a JSON "
        "object of KeyId, ImportToken and EncryptedKeyMaterial, which belong together",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write there, without a line end; it must not exist"
    )
    # A stray argument may be key material: argparse would repeat it in its error.
    parser.add_argument("stray", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything, encrypt, keep what was drawn, and only then give out the ciphertext."""
    forbid_core_dumps()
    if args.stray:
        raise ConfigurationError(
            "an argument without the name of an option (not shown here: key material is never "
            "given on a command line); files are given by --parameters, --key-material, "
            "--generate and --out"
        )
    if args.format == "raw" and args.out is None and sys.stdout.isatty():
        raise ConfigurationError("raw bytes do not go to a terminal; use --out FILE")
    algorithm, key_spec = WrappingAlgorithm(args.algorithm), KeySpec(args.key_spec)
    for option, path in (("--generate", args.generate), ("--out", args.out)):
        if path is not None and os.path.lexists(path):
            raise ConfigurationError(f"{option} {path}: exists, and is never overwritten")
    parameters = read_parameters(_parameters_text(args.parameters))
    parameters.require_usable(algorithm, datetime.now(UTC))
    material = _given(args.key_material, key_spec) if args.key_material else _drawn(key_spec)
    ciphertext = encrypt_key_material(algorithm, parameters.public_key, material)
    if args.generate:
        PrivateFile(args.generate, "--generate").write_new(material)
    print(
        f"CMK {parameters.key_id}, {key_spec}, {algorithm} under {parameters.spec}, parameters "
        f"valid until {parameters.expires_at:%Y-%m-%dT%H:%M:%SZ}\n"
        f"public key SHA-256 {parameters.fingerprint}",
        file=sys.stderr,
    )
    if args.generate:
        print(f"key material in {args.generate}: keep it, the KMS never gives it back",
              file=sys.stderr)  # fmt: skip
    _give_out(_formatted(args.format, parameters, ciphertext), args.out)
    return 0


def _parameters_text(path: str) -> str:
    try:
        if path == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"--parameters {path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigurationError(f"--parameters: more than {MAX_BYTES} bytes")
    # utf-8-sig: editors on Windows write a byte-order mark.
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidParameter("parameters", "are not text in UTF-8") from None


def _given(path: str, key_spec: KeySpec) -> bytes:
    if not os.path.lexists(path):
        raise ConfigurationError(
            "--key-material: no such file (its name is not shown here: it may be the key material "
            "itself, which is never given on a command line)"
        )
    material = PrivateFile(path, "key material").read_bytes()
    require_key_material(material, key_spec)
    return material


def _drawn(key_spec: KeySpec) -> bytes:
    while True:
        material = secrets.token_bytes(key_spec.material_length)
        try:
            require_key_material(material, key_spec)
        except InvalidParameter:  # by chance it looks like text, and would be refused next time
            continue
        return material


def _formatted(form: str, parameters: AnsweredParameters, ciphertext: bytes) -> bytes:
    encoded = base64.b64encode(ciphertext)
    if form == "request":
        request = {
            "KeyId": parameters.key_id,
            "ImportToken": parameters.import_token,
            "EncryptedKeyMaterial": encoded.decode(),
        }
        return json.dumps(request, indent=2).encode()
    return ciphertext if form == "raw" else encoded


def _give_out(content: bytes, path: str | None) -> None:
    if path is not None:
        PrivateFile(path, "--out").write_new(content)
        return
    sys.stdout.buffer.write(content)
    if sys.stdout.isatty():  # a line end in a file or a variable would be one in the request
        sys.stdout.buffer.write(b"\n")
