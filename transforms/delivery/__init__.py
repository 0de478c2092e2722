"""Beam-free: where alerts and dead letters go."""
