"""What pruning did, as a page to read: values -> tables and charts -> one HTML file."""

from .write import write_report

__all__ = ["write_report"]
