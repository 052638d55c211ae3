"""Our models in the benchmarks of others: lm-evaluation-harness (`harness`) and Inspect (`inspect_api`)."""
