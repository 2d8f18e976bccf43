"""Alibaba's RPC API over :mod:`hsmwrap.kms` (extra ``server``): unmodified SDKs import keys.

``hsmwrap.http.app`` is the WSGI application, ``hsmwrap.http.server`` runs it under gunicorn.
"""
