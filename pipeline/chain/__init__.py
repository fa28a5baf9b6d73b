"""The one runner of chains: a recipe of stages, each a call of a door of the project. `recipe.py` tells the format."""
