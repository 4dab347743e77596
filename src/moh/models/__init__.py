"""Models: whole networks with MoH attention, each inside the library that people use for its kind."""
