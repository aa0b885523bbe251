"""How anything is measured and kept: clocks and rounds, intervals and verdicts, the machine, result files, plots, pages."""
