"""From a checkpoint to verdicts."""
