"""Validated examples → rows by recipe → tokens with regions → packed batches."""
