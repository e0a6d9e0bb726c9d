"""What people read of a finished study: text tables, one HTML page that needs no network, figures for papers."""

from reconmtl.reporting.page import report

__all__ = ["report"]
