"""`sequoia train-draft`: from a target to a small draft of its own."""
