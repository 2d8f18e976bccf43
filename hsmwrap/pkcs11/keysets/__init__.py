"""The backend's own keys: key sets that authenticate import tokens and seal keys.

``keys`` finds and makes the keys of a set; ``hardening`` and ``origin`` say which attributes the
HSM token knows, that protect a key or tell where it came from; ``admin`` is what ``hsmwrap keys``
does: make, rotate, retire, list.
"""
