"""The CPU engine in C: one call a forward, weights in panels, rows that do not depend on their company."""
