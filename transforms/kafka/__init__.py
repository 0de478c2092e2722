"""Beam-free: how Kafka brokers are reached."""
