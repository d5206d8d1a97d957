"""Dataset: what lies on disk."""
