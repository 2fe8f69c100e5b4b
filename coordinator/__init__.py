"""The coordinator: owns the committed tokens and runs the loop."""
