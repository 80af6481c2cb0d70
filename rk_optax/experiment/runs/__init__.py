"""One compiled training loop, and the three kinds of experiment that use it."""
