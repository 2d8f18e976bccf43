"""Searches through sessions that tests make up, beside those of python-pkcs11."""

from pkcs11._pkcs11 import SearchIter
from pkcs11._pkcs11 import Session as RealSession


class Search:
    """What SearchIter is to a real session; ``get_objects`` of the other one has the objects."""

    def __init__(self, session, template):
        self._found = session.get_objects(template)

    def __enter__(self):
        return [self._found]

    def _finalize(self):
        pass


def search_of(session, template, size):
    """In place of SearchIter."""
    if isinstance(session, RealSession):
        return SearchIter(session, template, size)
    return Search(session, template)
