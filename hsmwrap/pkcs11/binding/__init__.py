"""python-pkcs11 and everything that works around it.

``module`` initialises a PKCS#11 module for threads; ``host`` shares it in the process, restarts it
and makes forks wait; ``returncodes`` is the recovery table; ``templates`` and ``profiles`` say how
objects and vendors' mechanisms are spelled; ``client_errors`` maps what the HSM answers to a
client's ciphertext; ``trials`` tells what it refuses; ``gcm``, ``objectlock`` and ``filenumbers``
work around NSS, SoftHSM and opencryptoki.
"""
