"""Open larger calls that hold attention: torch.nn's multi-head attention and encoder layers."""
