"""The verify worker: scores token trees with the target model."""
