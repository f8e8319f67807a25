"""The GlobalLocal model. Relative imports only, so that these files travel with the weights."""
