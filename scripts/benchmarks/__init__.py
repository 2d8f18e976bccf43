"""The cost of hsmwrap compared with the raw operations it consists of; run by ``scripts/bench``."""
