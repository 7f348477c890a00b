"""A conversion from the model to the finished file: its plan, its run, and what it keeps to go on from."""
