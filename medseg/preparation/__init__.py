"""Preparation: raw case to prepared case to store, and back to the original grid."""
