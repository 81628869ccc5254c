"""Reports, comparisons and sweeps as pages: one file each that loads nothing and runs nothing. Knows no torch."""

from lightning_edge.reporting.html.comparison import comparison_page
from lightning_edge.reporting.html.fit import report_page
from lightning_edge.reporting.html.sweep import sweep_page, sweep_svg

__all__ = ["comparison_page", "report_page", "sweep_page", "sweep_svg"]
