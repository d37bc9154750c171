"""How good a model is: runs measured by figures that need no other network."""
