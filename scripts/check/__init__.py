"""What checks that takes too long for every run of the tests, or a machine of its own."""
