"""Figures: heat maps, panels, curves."""
