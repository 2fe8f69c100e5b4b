"""Small drafts trained on what a target writes: its text, the student, the training, and what came of it."""
