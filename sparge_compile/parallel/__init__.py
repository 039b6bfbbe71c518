"""Attention over a sequence that several processes share: exchanges for heads (Ulysses), a ring, and both."""
