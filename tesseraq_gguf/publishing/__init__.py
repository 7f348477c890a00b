"""Files for others: named by convention, described by what was measured, in a folder or on the hub. No torch."""
