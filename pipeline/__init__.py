"""What a person runs: the command line, the graph, and the loop of slices."""
