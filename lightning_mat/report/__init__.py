"""What happened in a run: stored probes, pictures, tables and one HTML page.

matplotlib is imported only when a picture is drawn.
"""

from lightning_mat.report.page import report
from lightning_mat.report.plot import active_map, lambda_max_plot
from lightning_mat.report.store import Probe, SpectraData, SpectraStore, read
from lightning_mat.report.table import results_table, text_table

__all__ = [
    "Probe",
    "SpectraData",
    "SpectraStore",
    "active_map",
    "lambda_max_plot",
    "read",
    "report",
    "results_table",
    "text_table",
]
