"""What a model does: generate, judge, locate refusals, and report, one stage after the other."""
