"""The ends of a run that are no defects: stopped, a process lost, files not written."""

from __future__ import annotations


class PeerLost(Exception):
    """Other processes of the run died or fell behind; the text names them and the operation."""


class NotWritten(Exception):
    """A run has come to its end, but files of it are missing; the text names them."""


class Stopped(Exception):
    """The run was asked to stop, and what it has trained is saved."""
