"""Work that is done once for all worker processes of a test run."""

import fcntl


def once(tmp_path_factory, name, work):
    """The text that ``work(directory)`` returned, in the first worker that asked for ``name``.

    The others wait for it. If it fails, the next one tries again.
    """
    base = tmp_path_factory.getbasetemp()
    # A worker of pytest-xdist has a directory of its own in that of the run.
    run = base.parent if base.name.startswith("popen-") else base
    directory = run / f"once-{name}"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = directory / "result"
        if not result.exists():
            text = work(directory)
            result.write_text(text)
        return result.read_text()
