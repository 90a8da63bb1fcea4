"""Where decoded images and features of frozen backbones are kept."""
