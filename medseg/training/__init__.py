"""Training: loss, augmentation, batches, the visible loop, checkpoints."""
