"""The engine: the only place for torch."""
