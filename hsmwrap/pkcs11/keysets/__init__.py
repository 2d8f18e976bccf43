"""The backend's own keys: key sets that authenticate import tokens and seal keys.

``keys`` finds and makes the keys of a set; ``hardening`` says which protecting attributes the HSM
token knows; ``admin`` is what ``hsmwrap keys`` does: make, rotate, retire, list.
"""
