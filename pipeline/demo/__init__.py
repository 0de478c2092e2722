"""The demonstration: a real LLM, a real log and a real broker, all from package registries."""
