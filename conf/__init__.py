"""Hydra configuration groups of anomaly_lit."""
