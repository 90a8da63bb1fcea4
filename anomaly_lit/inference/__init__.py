"""From a checkpoint to verdicts on images."""
