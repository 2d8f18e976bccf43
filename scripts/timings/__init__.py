"""Whether time tells what is wrong with a ciphertext; run by ``scripts/timing``."""
