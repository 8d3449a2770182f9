"""A smaller model of one's own: planned, made, measured and judged, as ``pruning-utils`` does."""
