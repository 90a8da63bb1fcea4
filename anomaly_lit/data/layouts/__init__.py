"""Data sets: which categories a folder holds, and which images a category holds."""
