"""The draft worker: grows token trees with the draft model."""
