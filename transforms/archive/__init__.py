"""Beam-free: rows of the archive's tables, and the Parquet files that hold them."""
