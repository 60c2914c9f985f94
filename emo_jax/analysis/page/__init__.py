"""report.html of an analysis: one file that needs no network."""
