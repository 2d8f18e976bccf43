"""The backend's own keys: key sets that seal import tokens, wrapping keys and key material.

``keys`` finds and makes the keys of a set; ``hardening`` says which protecting attributes the HSM
token knows; ``admin`` is what ``hsmwrap keys`` does: make, rotate, retire, list.
"""
