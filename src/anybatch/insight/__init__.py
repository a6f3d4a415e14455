"""One self-contained HTML page (jinja2, inline SVG), and the same results as tables. Shows the types of plan, data and mining."""

from anybatch.insight.gradient_page import render_gradient_page
from anybatch.insight.page import Report, render_report
from anybatch.insight.plan_figures import Figure, plan_figures, plan_sizes, set_figures
from anybatch.insight.plan_page import render_plan_page
from anybatch.insight.tables import MethodResult, comparison_table, markdown_table, metrics_table

__all__ = [
    "Figure",
    "MethodResult",
    "Report",
    "comparison_table",
    "markdown_table",
    "metrics_table",
    "plan_figures",
    "plan_sizes",
    "render_gradient_page",
    "render_plan_page",
    "render_report",
    "set_figures",
]
