"""docs/errors.md lists every error class with what it is."""

import importlib
import re

from support.documents import ROOT, section_of

from hsmwrap.errors import HsmwrapError

MODULES = ("hsmwrap.errors", "hsmwrap.kms.errors", "hsmwrap.kms.audit", "hsmwrap.http.errors")
ROW = re.compile(r"^\| `(\w+)` \| `([\w.]+)` \| (\d+) \| (yes|no) \| \S.* \|$", re.MULTILINE)


def test_all_errors_are_listed_as_they_are():
    raised = set()
    for module in map(importlib.import_module, MODULES):
        for name, error in vars(module).items():
            if isinstance(error, type) and issubclass(error, HsmwrapError):
                retryable = "yes" if error.retryable else "no"
                raised.add((name, error.code, str(error.http_status), retryable))
    listed = ROW.findall(section_of(ROOT / "docs" / "errors.md", "All errors"))
    assert len(listed) == len(set(listed))
    assert set(listed) == raised
