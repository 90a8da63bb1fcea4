"""One run: from its configuration to its results, and what it leaves in its folder."""
