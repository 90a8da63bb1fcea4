"""Results of runs: rows of predictions, tables, one page.

- `read`: runs as they lie in their folders
- `rows`: runs gathered over seeds and categories
- `tables`: tables of rows, as texts, CSV, Markdown and LaTeX
- `page`, `plots`, `page.html.j2`: the same as one HTML file
- `predictions`: the rows of predictions.csv
- `terminal`: tables on the screen
"""
