"""Reconstruction-based industrial anomaly detection."""
