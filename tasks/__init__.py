"""Tasks and their verifiable rewards."""
