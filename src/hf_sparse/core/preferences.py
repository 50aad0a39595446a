"""What a user may prefer of sparse layers: memory, speed, or what pays for the model as a whole."""

PREFERENCES = ("auto", "memory", "speed")
