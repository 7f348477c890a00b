"""What to make, as a user says it: the recipe, its options, and rules that name types. No torch."""
