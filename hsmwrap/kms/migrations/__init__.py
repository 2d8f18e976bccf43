"""Schema migrations of the reference KMS (alembic); run by ``Database.migrate``."""
