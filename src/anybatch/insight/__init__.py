"""What to know before training, as tables, figures and HTML pages. The core never imports this room."""

from anybatch.insight.pages import Report, render_report
from anybatch.insight.tables import MethodResult, comparison_table, markdown_table, metrics_table

__all__ = [
    "MethodResult",
    "Report",
    "comparison_table",
    "markdown_table",
    "metrics_table",
    "render_report",
]
