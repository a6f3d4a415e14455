"""One self-contained HTML page (jinja2, inline SVG), and the same results as tables. Imports nothing of ours."""

from anybatch.report.page import Report, render_report
from anybatch.report.tables import MethodResult, comparison_table, markdown_table, metrics_table

__all__ = ["MethodResult", "Report", "comparison_table", "markdown_table", "metrics_table", "render_report"]
