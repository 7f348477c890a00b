"""What measures, and where it puts what was measured."""
