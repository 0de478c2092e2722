"""The model side, without Beam: directions, trunk, roles of tokens."""
