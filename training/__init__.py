"""Training: the package's objectives behind an optimizer, on Ray Train."""
