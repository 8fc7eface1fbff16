"""From the result files to BENCHMARKS.md: tables, sentences and figures, nothing by hand."""
