"""Will it fit, how fast, what does it cost: the train step compiled for a TPU that is not there."""
