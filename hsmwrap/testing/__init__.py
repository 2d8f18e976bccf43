"""Testing tools for authors of backends: fault injection in front of any PKCS#11 module.

Start at :mod:`hsmwrap.testing.faults`. Nothing here is imported by hsmwrap itself.
"""
