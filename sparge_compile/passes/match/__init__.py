"""Match attention: each spelling becomes one :class:`~.attention.Attention`, or a refusal with a reason."""
