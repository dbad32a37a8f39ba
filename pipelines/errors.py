"""The one exception that commands turn into a one-line message and exit status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right; the text names the field, file or flag and the remedy."""
