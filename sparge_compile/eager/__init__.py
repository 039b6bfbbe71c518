"""Attention in eager code, where no graph is: each call is taken as a graph of one node."""
