"""Run a compiled graph in the user's model: where it stands, which thresholds it gets, who is told of it."""
