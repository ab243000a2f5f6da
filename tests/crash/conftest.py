"""Fixtures of the crash suites."""

from __future__ import annotations

from tests.ranks.conftest import nursery as nursery  # jobs of several ranks are forked here too
