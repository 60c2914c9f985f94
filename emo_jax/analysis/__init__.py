"""What the experts of a trained model became: the activations of its routers, their clusters, what they tell of the text."""
