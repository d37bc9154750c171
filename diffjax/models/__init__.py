"""Models that can be sampled: the facade, and a file for each family of published models."""
