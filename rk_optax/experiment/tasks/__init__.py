"""What is trained: data sets, networks, and full-batch problems with a known solution."""
