"""What is trained: losses over a model's hidden states, as `(loss_sum, weight_sum, metrics)`."""
