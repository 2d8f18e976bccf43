"""Which HSM token, and how to log in to it.

``uri`` parses RFC 7512 URIs; ``selection`` finds the one HSM token that the configuration means;
``pin`` reads the PIN from where the configuration says; ``login`` logs in, and stops before a
refused PIN locks the HSM token.
"""
