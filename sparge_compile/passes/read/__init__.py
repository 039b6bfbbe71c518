"""Read a graph: the ATen calls of its nodes, the axes of their tensors, who writes to them, what they hold."""
