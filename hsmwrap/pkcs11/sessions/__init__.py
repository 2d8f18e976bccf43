"""Sessions on one HSM token, and recovery by return code.

``pool`` lends sessions; ``connection`` runs an operation in one and mends what can be mended;
``breaker`` fails fast while the HSM is unreachable; ``reconnector`` finds it again without traffic.
"""
