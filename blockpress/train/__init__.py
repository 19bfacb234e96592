"""Training: the objective, the data, the recipes and the loop that runs them."""
