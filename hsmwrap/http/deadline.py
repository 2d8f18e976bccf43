"""Deadlines for what a client sends and takes, in seconds.

Each starts once; the next byte does not start it again.
"""

from __future__ import annotations

IDLE_SECONDS = 30.0
"""How long a connection may wait without a request, before the first one and between two."""

HEAD_SECONDS = 10.0
"""How long request line and header fields may take, from the first byte on."""

BODY_SECONDS = 30.0
"""How long a body may take, from the end of the head on."""

ANSWER_SECONDS = 30.0
"""How long a client may take to accept an answer."""

REST_SECONDS = 5.0
"""How long a client may send on after an answer that ends the connection, and how long a request
that is arriving may still take when the server stops."""

LAST_REQUEST_SECONDS = 2.0
"""How long an idle connection may wait for a last request, when a successor takes over."""

PAGE_SECONDS = 5.0
"""How long ``/readyz`` and ``/metrics`` may take until 503 is the answer."""
