"""Parts of `scripts/bench_quality`: the rows to measure, what they are made from, their results, the report."""
