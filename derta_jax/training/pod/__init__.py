"""The processes of a pod: they meet, are checked, watch each other, and end together."""
