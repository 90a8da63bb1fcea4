"""Configurations as plain data: build them, validate them, decide what to trust."""
