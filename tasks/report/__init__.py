"""The report of a merged version: one self-contained page, and its plots as pictures.

Pure functions of plain JSON values: nothing is read, nothing is computed that was not given,
and the same input gives the same bytes.
"""

from restitch.tasks.report.page import Report, ReportInput, render

__all__ = ["Report", "ReportInput", "render"]
