"""hsmwrap: the pluggable key backend behind a KMS's bring-your-own-key import."""

__version__ = "0.1.0"
