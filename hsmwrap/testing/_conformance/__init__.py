"""The conformance kit's tests by topic; :mod:`hsmwrap.testing.conformance` puts them together."""
