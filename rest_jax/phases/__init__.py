"""What a run does, step by step, on sealed folders."""
