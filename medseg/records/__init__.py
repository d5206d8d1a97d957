"""Records: the words of medseg. Frozen, validated, JSON in and out."""
