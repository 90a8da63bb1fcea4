"""Configurations as plain data: build, validate, trust."""
