"""A package, so that its test modules may share names with others."""
