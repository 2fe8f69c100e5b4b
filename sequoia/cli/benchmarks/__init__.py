"""The benchmarks behind `sequoia bench`: flags, tables and plots; what measures is loaded only to measure."""
