"""``python -m hsmwrap.cli``: the command if its script is not on the PATH."""

import sys

from hsmwrap.cli import main

sys.exit(main())
