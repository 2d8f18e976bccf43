"""Migrations, oldest first; a released one never changes."""
