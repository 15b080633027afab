"""Fused kernels and a model layer for stitched vision transformers."""
