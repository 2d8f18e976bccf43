"""What hsmwrap costs beside the raw operations that it contains; run by ``scripts/bench``."""
