"""Evaluation: metrics, scores, model selection, post-processing."""
