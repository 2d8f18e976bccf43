"""The revisions of the database's schema, for what needs no alembic: it takes long to import."""

REVISIONS = ("0001",)
"""All that this program knows, oldest first; a test compares them with alembic's."""
