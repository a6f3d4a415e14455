"""What to know before training, as tables, figures and HTML pages. The core never imports this room."""

from anybatch.insight.curves import Curves
from anybatch.insight.tables import markdown_table, metrics_table

__all__ = ["Curves", "markdown_table", "metrics_table"]
