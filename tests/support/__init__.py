"""Helpers that the tests share, and programs that they run in other processes.

services   tokens and a database, each private to a run: SoftHSM2, NSS, p11-kit, PostgreSQL
backends   backends that are honest, spy or break one promise
pkcs11, faults, keypool, kms, http   what the tests of that area share
"""
