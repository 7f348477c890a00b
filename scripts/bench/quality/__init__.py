"""The rows to measure, what they are made from, their results, the report."""
