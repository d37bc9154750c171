"""Sampling as a job: a request is completed, drawn in batches and kept in a folder, from which a killed job goes on."""
