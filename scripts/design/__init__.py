"""What makes constants that files depend on."""
