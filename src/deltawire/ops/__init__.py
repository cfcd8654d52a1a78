"""What operators use: the demo."""
