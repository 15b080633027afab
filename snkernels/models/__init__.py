"""The stitched model: anchors, the least-squares start, and checkpoints."""
