"""Logs of conversations: reading entries, dating them, planning slices; free of Beam."""
