"""The HTML report of a run: one file that opens offline."""

from __future__ import annotations

from skinfast.report.html import write_report

__all__ = ["write_report"]
