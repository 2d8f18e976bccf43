"""Wrapping keys and key material: what a KMS asks the backend for.

``probe`` tries what the HSM token can do and ``report`` says it; ``custody`` keeps wrapping keys,
``rsa`` and ``sm2`` unwrap under them; ``material`` makes the result a key; ``reaper`` removes
expired wrapping keys.
"""
