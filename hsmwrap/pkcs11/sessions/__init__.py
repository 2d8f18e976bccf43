"""Sessions on one HSM token, and recovery by return code.

``connection`` runs an operation in a session, a second time where that is safe; ``connecting``
finds the HSM token and logs in; ``pool`` lends sessions (``session``); ``recovery`` makes one
attempt and mends what failed; ``pending`` destroys what failed operations left.
"""
