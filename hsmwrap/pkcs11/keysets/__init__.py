"""The backend's own keys: key sets that authenticate import tokens and seal keys.

``keys`` finds and makes the keys of a set; ``origin`` says which attributes tell that a key was
generated in the HSM token, ``hardening`` which protecting ones it knows; ``admin`` is what ``hsmwrap keys`` does: make, rotate, retire, list.
"""
