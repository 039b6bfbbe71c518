"""Write into a graph: operands and results of the op, threshold inputs, additional outputs, taps."""
