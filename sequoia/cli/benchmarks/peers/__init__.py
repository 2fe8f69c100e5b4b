"""Other engines behind one protocol. Each file runs as a script in an environment of its own, which has no sequoia."""
