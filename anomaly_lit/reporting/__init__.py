"""Results of many runs: read, tables, one page."""
