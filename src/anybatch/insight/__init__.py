"""What to know before training, as tables, figures and HTML pages. The core never imports this room."""

from anybatch.insight.pages import Report, render_gradient_page, render_report
from anybatch.insight.plan_figures import Figure, plan_sizes, set_figures
from anybatch.insight.plan_page import render_plan_page
from anybatch.insight.tables import MethodResult, comparison_table, markdown_table, metrics_table

__all__ = [
    "Figure",
    "MethodResult",
    "Report",
    "comparison_table",
    "markdown_table",
    "metrics_table",
    "plan_sizes",
    "render_gradient_page",
    "render_plan_page",
    "render_report",
    "set_figures",
]
