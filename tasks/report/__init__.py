"""The HTML report, its plots, and the model card of an export.

Only the flows `audit.report`, `export` and `research` import it.
"""

from restitch.tasks.report.page import Report, ReportInput, render

__all__ = ["Report", "ReportInput", "render"]
