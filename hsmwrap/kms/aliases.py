"""Aliases: names of keys. Each names one key; a key may have several.

An alias gives no rights: an operation that is called with an alias needs the permission for the key
(:mod:`hsmwrap.kms.service`). The aliases of a key go with its row. From the date of the deletion on
they are free, whether or not the sweeper has deleted the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, func, select, update

from hsmwrap.arguments import checked_methods
from hsmwrap.kms.core import Core, existing
from hsmwrap.kms.errors import AliasAlreadyExists, AliasNotFound
from hsmwrap.kms.schema import Alias, Key
from hsmwrap.kms.states import require


@dataclass(frozen=True, slots=True)
class AliasPage:
    """One page of aliases; ``total`` counts those of all pages."""

    aliases: tuple[Alias, ...]
    total: int


@checked_methods
class Aliases:
    """Operations on aliases; a name has the prefix ``alias/``."""

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self._core = core

    def key_of(self, name: str) -> str | None:
        """Id of the key that has this alias; None: it does not exist."""
        with self._core.database.read() as transaction:
            return transaction.scalar(select(Alias.key_id).where(Alias.name == name))

    def create(self, name: str, key_id: str) -> None:
        """Give a key an alias.

        Raises:
            AliasAlreadyExists: A key has it.
            KeyNotFound: The key does not exist.
            StateModifiedFailed: The key is scheduled for deletion.
        """
        now = self._core.clock()
        live = select(Key.key_id).where(existing(now))
        with self._core.locked(key_id, now) as (transaction, key):
            require("CreateAlias", key.state)
            transaction.execute(delete(Alias).where(Alias.name == name, Alias.key_id.not_in(live)))
            insert = self._core.database.insert(Alias).values(name=name, key_id=key_id)
            made = transaction.execute(insert.on_conflict_do_nothing().returning(Alias.name))
            if made.first() is None:
                raise AliasAlreadyExists("a key has this alias; UpdateAlias moves it")

    def update(self, name: str, key_id: str, current: str) -> None:
        """Give the alias of the key ``current`` to another key.

        Raises:
            AliasNotFound: ``current`` does not have it (any more).
            KeyNotFound: The key does not exist.
            RejectedPendingDeletion: The key is scheduled for deletion.
        """
        with self._core.locked(key_id, self._core.clock()) as (transaction, key):
            require("UpdateAlias", key.state)
            moved = transaction.execute(
                update(Alias)
                .where(Alias.name == name, Alias.key_id == current)
                .values(key_id=key_id)
                .returning(Alias.name)
            )
            if moved.first() is None:
                raise AliasNotFound("another call changed this alias at the same time")

    def delete(self, name: str, current: str) -> None:
        """Delete the alias of the key ``current``.

        Raises:
            AliasNotFound: ``current`` does not have it (any more).
        """
        with self._core.database.write() as transaction:
            deleted = transaction.execute(
                delete(Alias)
                .where(Alias.name == name, Alias.key_id == current)
                .returning(Alias.name)
            )
            if deleted.first() is None:
                raise AliasNotFound("another call changed this alias at the same time")

    def list(self, page_number: int, page_size: int, key_id: str | None = None) -> AliasPage:
        """One page of the aliases by name, of one key or of all; pages count from 1.

        Raises:
            KeyNotFound: The key does not exist.
        """
        which = select(Alias).join(Key, Key.key_id == Alias.key_id)
        which = which.where(existing(self._core.clock()))
        if key_id is not None:
            self._core.current(key_id)
            which = which.where(Alias.key_id == key_id)
        page = which.order_by(Alias.name).offset((page_number - 1) * page_size).limit(page_size)
        with self._core.database.read() as transaction:
            total = transaction.scalar(select(func.count()).select_from(which.subquery())) or 0
            return AliasPage(tuple(transaction.scalars(page)), total)
