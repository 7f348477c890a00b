"""Mutations: what they are, how they are drawn from the code, and the list of those that have a name."""
