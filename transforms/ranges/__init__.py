"""Ranges of per-conversation extremes and the policies that judge by them; free of Beam."""
