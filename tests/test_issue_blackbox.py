"""Helpers that moved to runs.py."""

from runs import *  # noqa: F403
