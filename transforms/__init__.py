"""What happens to a record, one module a step; mathematics lives in Beam-free sub-packages."""
