"""Temporary files in memory, where there is room for them."""

import os
import shutil
import tempfile

_MEMORY = "/dev/shm"
_ENOUGH = 2 << 30
"""Bytes; a whole run uses less than a tenth."""


def use():
    """Let this process and its children make temporary files there, unless TMPDIR says where.

    SoftHSM waits for the disk at each change of an object (field note 80).
    """
    if "TMPDIR" in os.environ or not os.access(_MEMORY, os.W_OK | os.X_OK):
        return
    if shutil.disk_usage(_MEMORY).free >= _ENOUGH:
        os.environ["TMPDIR"] = _MEMORY
        tempfile.tempdir = None
