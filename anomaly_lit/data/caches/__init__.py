"""Caches of decoded images and of the features of frozen backbones."""
