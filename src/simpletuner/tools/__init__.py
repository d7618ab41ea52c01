"""What is done to finished files: adapters into a model, an adapter out of two models, a look at a file."""
