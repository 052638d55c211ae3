"""The built-in synthetic world and the experiment that shows the method working in it."""
