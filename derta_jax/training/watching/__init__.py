"""What a run says of itself: figures, speeds, where its time went, traces."""
