"""Report §5: scores of finished models, and agreement with the reference implementation."""
