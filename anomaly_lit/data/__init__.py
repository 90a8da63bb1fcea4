"""Data sets and data modules."""
