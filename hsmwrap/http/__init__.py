"""Alibaba's RPC API over :mod:`hsmwrap.kms` (extra ``server``), for unmodified SDKs.

``hsmwrap.http.app`` is the WSGI application, ``hsmwrap.http.server`` runs it under gunicorn.
"""
