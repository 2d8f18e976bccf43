"""Whether a text tells a part of a share."""

import itertools
import re


def told(share, text):
    """Neighbouring words of a share in a text; a single word is common English."""
    words, said = share.lower().split(), " ".join(re.findall("[a-z]+", text.lower()))
    return [pair for pair in map(" ".join, itertools.pairwise(words)) if pair in said]
