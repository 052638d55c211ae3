"""Is an answer unsafe, refused or safe: by rule, by another model, by people; and how far they agree."""
