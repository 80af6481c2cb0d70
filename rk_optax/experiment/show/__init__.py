"""What a reader sees: progress, tables and figures."""
