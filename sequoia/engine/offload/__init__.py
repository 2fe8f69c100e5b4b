"""Models larger than the memory they run in: their weights stay on a slower tier and pass through a few buffers."""
